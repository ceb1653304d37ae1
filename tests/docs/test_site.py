"""The site builds without a warning and without a network, and its reference is complete."""

import re
import socket
import typing
from pathlib import Path
from typing import Any

import pytest
from sphinx.cmd.build import build_main

import toolkit
from tests.docs.running import ROOT
from toolkit.metrics.system import _samples
from toolkit.runs.files import RUN_FILES

DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; whatever asks for a name or a connection fails."""

    def refuse(*arguments: Any) -> typing.NoReturn:
        raise OSError("the site is built without a network")

    out = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", refuse)
        patch.setattr(socket.socket, "connect", refuse)
        assert (
            build_main(["-W", "-q", "-b", "html", "-d", f"{out}-doctrees", str(DOCS), str(out)])
            == 0
        )
    return out


def test_every_page_is_built_and_commands_fields_and_names_have_a_heading(site: Path) -> None:
    for page in DOCS.rglob("*.md"):
        assert (site / page.relative_to(DOCS).with_suffix(".html")).is_file(), page
    cli, config, api = (
        (site / "reference" / name).read_text() for name in ("cli.html", "config.html", "api.html")
    )
    for command in ("train", "resume", "runs list", "data inspect", "export-hf"):
        assert (
            f'<span class="pre">toolkit {command}</span>'.replace(
                " ", '</span> <span class="pre">'
            ).replace('<span</span> <span class="pre">class', "<span class")
            in cli
        ), command
    for field in ("rank_microbatch_size", "activation_offload", "stop_file", "at_tokens"):
        assert field in config
    for name in toolkit.__all__:
        assert f'id="toolkit.{name}"' in api, name


def test_every_file_of_a_run_folder_is_listed(site: Path) -> None:
    page = re.sub(r"<[^>]*>", "", (site / "reference" / "files.html").read_text())
    assert [
        path for path in RUN_FILES.__struct_fields__ if getattr(RUN_FILES, path) not in page
    ] == []


def test_every_metric_of_the_code_is_on_the_page(tmp_path: Path) -> None:
    """Names that are written as `"name": Metric(` or `metrics["name"] = Metric(`, and the keys of
    the machine's samples. `test_readme` compares what a run records."""
    code = "".join(path.read_text() for path in (ROOT / "toolkit/train").rglob("*.py"))
    found = re.findall(r'"(\w+)": Metric\(|metrics\["(\w+)"\] = Metric\(', code)
    named = metric_names()
    assert len(found) > 10
    assert {left or right for left, right in found} <= named
    samples = _samples(str(tmp_path))
    next(samples)
    assert {re.sub(r"^gpu\d+", "gpuN", name) for name in next(samples)} <= named
    samples.close()


def metric_names() -> set[str]:
    """Every name on the page of metrics."""
    return set(re.findall(r"`([\w./]+)`", (DOCS / "reference/metrics.md").read_text()))


def test_pages_are_short_and_links_lead_to_files() -> None:
    for page in DOCS.rglob("*.md"):
        text = page.read_text()
        if page.parent != DOCS:
            assert len(text.splitlines()) < 120, page
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
