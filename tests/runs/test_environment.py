"""What is noted about command, repository and machine; never secrets."""

import subprocess

import pytest

from toolkit.runs.environment import describe_environment, describe_git, mask_secrets


def test_versions_are_noted_without_importing_the_libraries():
    import torch

    versions = describe_environment()["versions"]
    assert versions["torch"] == torch.__version__
    assert versions["numpy"]


def test_only_launcher_variables_and_no_secrets(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("ACCELERATE_API_KEY", "hidden")
    monkeypatch.setenv("TORCH_TOKEN", "hidden")
    monkeypatch.setenv("AWS_REGION", "x")
    variables = describe_environment()["variables"]
    assert variables["WORLD_SIZE"] == "2"
    assert variables["ACCELERATE_USE_FSDP"] == "true"
    assert not {"ACCELERATE_API_KEY", "TORCH_TOKEN", "AWS_REGION"} & set(variables)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("--run.registry=postgresql://me:pw@db/runs", "--run.registry=postgresql://me:***@db/runs"),
        ("--hub-token=abc", "--hub-token=***"),
        ("--api_key=abc", "--api_key=***"),
        ("--data_loader.eval_tokens=5", None),
        ("--dataset.tokenizer.eos_token=<eos>", None),
        ("--dataset.tokenizer.path=gpt2", "--dataset.tokenizer.path=gpt2"),
        ("--trainer.max_duration={value: 5, unit: tokens}", None),
    ],
)
def test_masking(text, masked):
    assert mask_secrets(text) == (masked or text)


def git(folder, *words):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True)


def test_git_commit_branch_and_changes(tmp_path):
    git(tmp_path, "init", "-b", "trunk")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-m", "x")
    clean = describe_git(tmp_path)
    assert len(clean["commit"]) == 40
    assert (clean["branch"], clean["dirty"]) == ("trunk", False)
    (tmp_path / "a").write_text("2")
    assert describe_git(tmp_path)["dirty"] is True


def test_no_repository_and_no_git_are_fine(tmp_path, monkeypatch):
    assert describe_git(tmp_path) == {"repository": None}
    monkeypatch.setenv("PATH", "")
    assert describe_git(tmp_path) == {"repository": None}
