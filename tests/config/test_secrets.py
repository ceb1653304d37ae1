"""Secrets leave no trace in what only informs, and are refused in what a resume starts from."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.config.interpolation import fill
from toolkit.config.secrets import check_no_secrets, is_secret_name, mask_secrets
from toolkit.errors import ConfigError
from toolkit.experiment.config import ExperimentConfig

NAMES = (
    "HF_TOKEN", "hf_token", "token", "AWS_SECRET_ACCESS_KEY", "password", "DB_PASSWORD", "api_key",
    "apiKey", "TORCH_DIST_PASSPHRASE", "client-secret", "private_key", "X-Amz-Signature",
    "access_token", "GITHUB_TOKEN",
)  # fmt: skip
TEXTS = (
    "--{name}={secret}", "{name}={secret}", "export {name}={secret}; run", '"{name}": "{secret}"',
    "{{{name}: {secret}}}", "s3://b/p?{name}={secret}", "https://h/p?a=1&{name}={secret}&b=2#c",
    "see https://h/?{name}={secret}, then", "--x.y='{{{name}: {secret}}}'", "{name} : '{secret}'",
)  # fmt: skip
PLAIN = (
    "postgresql://me:{secret}@host/db", "--run.registry=mysql+pymysql://u:p/{secret}@h:1/d",
    "s3://key:{secret}@bucket/a@b", "http://u:{secret}@[::1]:8080/", "--token {secret}",
    "HF_TOKEN {secret}", "run --hub-token {secret} --x 1", "Authorization: Bearer {secret}",
    "at redis://:{secret}@h/0: refused", "posted to https://hooks.slack.com/services/{secret}",
    "https://discord.com/api/webhooks/1/{secret}", "webhook: https://intern/{secret}",
    "--trainer.callbacks.notifier.slack=https://h:80/{secret}", "SLACK_URL='https://h/?t={secret}'",
)  # fmt: skip
SECRETS = st.text("abcXYZ019_-.~+/%!", min_size=9, max_size=30).map(lambda text: "qQ7" + text)


def texts() -> st.SearchStrategy[tuple[str, str]]:
    """`(text, the secret in it)`."""
    return SECRETS.flatmap(
        lambda secret: st.one_of(
            st.builds(
                lambda form, name: (form.format(name=name, secret=secret), secret),
                st.sampled_from(TEXTS),
                st.sampled_from(NAMES),
            ),
            st.sampled_from(PLAIN).map(lambda form: (form.format(secret=secret), secret)),
        )
    )


def nested(value: Any) -> st.SearchStrategy[Any]:
    """`value` somewhere inside of mappings and lists."""
    return st.lists(st.sampled_from(["list", "mapping", "tuple"]), max_size=4).map(
        lambda path: _wrap(value, path)
    )


def _wrap(value: Any, path: list[str]) -> Any:
    for kind in path:
        value = {"mapping": {"a": value, "n": 1}, "list": ["x", value], "tuple": (value, 2)}[kind]
    return value


@given(st.data())
def test_no_secret_survives_masking(data: st.DataObject) -> None:
    text, secret = data.draw(texts())
    masked = mask_secrets(data.draw(nested(text)))
    assert secret not in json.dumps(masked)
    assert mask_secrets(masked) == masked


@given(st.data(), st.sampled_from(NAMES), SECRETS)
def test_no_value_survives_under_a_name_that_says_it_is_secret(
    data: st.DataObject, name: str, secret: str
) -> None:
    value = data.draw(nested(secret))
    hook = {"webhook": f"https://intern/{secret}", "slack": f"https://x/a?b={secret}"}
    masked = mask_secrets(data.draw(nested({name: value, "kept": "this", "n": hook})))
    assert secret not in json.dumps(masked)
    assert "this" in json.dumps(masked)
    assert secret not in json.dumps(mask_secrets([f"--{name.lower()}", secret]))


@pytest.mark.parametrize(
    "text",
    [
        "--data_loader.eval_tokens=5", "--dataset.tokenizer.eos_token=<eos>", "postgresql://me@h/d",
        "--trainer.max_duration={value: 5, unit: tokens}", "set HF_TOKEN in the environment",
        "postgresql://u:${DB_PASSWORD}@h/db", "s3://b/p?token=${TOKEN}", "--hub-token=${HF_TOKEN}",
        "pad_token: <pad>", "1,024 tokens: 5.2 s", "step 5/10  loss 2.3", "s3://bucket/a/b?c=d",
    ],
)  # fmt: skip
def test_what_is_no_secret_stays(text: str) -> None:
    assert mask_secrets(text) == text


def test_the_value_of_a_secret_variable_is_masked_wherever_it_stands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MY_DB_PASSWORD", "swordfish-9")
    assert mask_secrets("cannot log in with swordfish-9 at h") == "cannot log in with *** at h"


def test_the_current_folder_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PWD", "/home/somebody/project")
    monkeypatch.setenv("OLDPWD", "/home/somebody")
    text = "done; everything is in /home/somebody/project/runs/first"
    assert mask_secrets(text) == text
    assert mask_secrets({"PWD": "/home/x", "pwd": "hunter2"}) == {"PWD": "/home/x", "pwd": "***"}


def test_no_field_of_the_config_has_a_name_that_would_be_refused() -> None:
    schema = json.dumps(msgspec.json.schema(ExperimentConfig))
    names = {name for name in schema.split('"') if name.isidentifier()}
    assert "registry" in names
    assert [name for name in names if is_secret_name(name, strict=True)] == []


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"run": {"registry": "postgresql://u:p/w@h/db"}},
         "run.registry: holds a secret.*--run.registry='postgresql://u:\\$\\{NAME\\}@h/db'"),
        ({"c": [{"upload_to": "s3://b/p?token=X"}]},
         "c.0.upload_to: holds a secret.*'s3://b/p\\?token=\\$\\{NAME\\}'"),
        ({"args": {"api_key": "abc"}}, "args.api_key: holds a secret"),
        ({"notifier": {"slack": "https://intern/x"}},
         "notifier.slack: holds a secret.*--notifier.slack='\\$\\{NAME\\}'"),
        ({"options": {"where": "https://hooks.slack.com/services/T0/B0/xyz"}},
         "options.where: holds a secret.*'https://hooks.slack.com/\\$\\{NAME\\}'"),
    ],
)  # fmt: skip
def test_a_secret_in_a_config_is_refused(data: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        check_no_secrets(data)


@pytest.mark.parametrize(
    "value",
    ["postgresql://u:${DB}@h/db", "http://host:8080/a@b", "s3://b/p?token=${T}", "s3://b/p?a=b",
     "https://hooks.slack.com/services/${HOOK}", "s3://hooks.b/webhooks/c"],
)  # fmt: skip
def test_a_config_without_secrets_passes(value: str) -> None:
    check_no_secrets({"a": [{"b": value}], "args": {"key": "k", "eos_token": "</s>"}})
    check_no_secrets({"notifier": {"webhook": "http://127.0.0.1:80", "slack": "${SLACK}"}})


def test_what_older_versions_masked_in_a_config_is_no_secret() -> None:
    data = {"registry": "postgresql://me:***@h/runs", "url": "https://h/x?token=***"}
    check_no_secrets(data | {"password": "***"})
    assert mask_secrets(data) == data


def config(**run: Any) -> ExperimentConfig:
    data = {"model": {"type": "transformer", "vocab_size": 8, "d_model": 8, "num_layers": 1,
                      "num_heads": 1, "intermediate_size": 8}}  # fmt: skip
    return msgspec.convert({**data, **run}, ExperimentConfig)


def test_variables_are_filled_in() -> None:
    written = config(run={"root": "${A}/runs-${B}"}, dataset={"root": "x/$${A}"})
    filled = fill(written, {"A": "/d", "B": "1"})
    assert (filled.run.root, filled.dataset.root) == ("/d/runs-1", "x/${A}")
    assert written.run.root == "${A}/runs-${B}"


def test_what_a_variable_holds_is_not_looked_at_again() -> None:
    assert fill(config(run={"root": "${A}"}), {"A": "${B}"}).run.root == "${B}"


def test_a_missing_variable_is_one_line() -> None:
    message = r"^run\.root: \$\{A\}: the environment variable A is not set; export it, or write "
    with pytest.raises(ConfigError, match=message):
        fill(config(run={"root": "${A}"}), {})


def test_texts_and_templates_are_left_alone() -> None:
    template = "{% for m in messages %}${A}{{ m.content }}{% endfor %}"
    written = config(
        description="costs ${A}",
        dataset={"instructions": {"chat_template": template, "system_prompt": "${A}"}},
        run={"root": "${1} $A {A} ${{A}}"},
    )
    assert fill(written, {}) is written


def test_what_a_variable_holds_must_fit() -> None:
    with pytest.raises(ConfigError, match=r"name must be a plain folder name.*filling in"):
        fill(config(run={"name": "${A}"}), {"A": "a/b"})
    with pytest.raises(ConfigError, match=r"run.root: 's3://b' is a URL, .*after filling in"):
        fill(config(run={"root": "${A}"}), {"A": "s3://b"})


@pytest.mark.parametrize(
    "message",
    [
        "dataset.source.token: no such field; known: name, split",
        "model.secret: expected a number, not null",
        "--upload_to='s3://key:${NAME}@bucket/runs'",
        "not allowed: NoCredentialsError: Unable to locate credentials; check credentials",
        "google.auth.exceptions.DefaultCredentialsError: Your default credentials were not found",
        "Credentials: Unable to locate them",
    ],
)
def test_messages_keep_their_words(message: str) -> None:
    assert mask_secrets(message) == message


@pytest.mark.parametrize(
    "text",
    [
        "token: nothing2",
        "s3://key:${NAME}hunter2@bucket",
        "password=no",
        "NoCredentialsError: password: hunter2",
        "CredentialsError=hunter2",
        "Credentials: hunter2",
    ],
)
def test_what_only_looks_like_words_is_hidden(text: str) -> None:
    assert "***" in mask_secrets(text)
