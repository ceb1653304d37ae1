"""`toolkit report`: a page that stands alone, says what the metrics say, and is small."""

import http.client
import json
import re
import shutil
import socket
import subprocess
import threading
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tests.runs.made import make_run
from toolkit.cli.main import run
from toolkit.commands.report import BoardServer, read_report, write_html, write_pngs
from toolkit.commands.report.page import SECTIONS, html
from toolkit.errors import ConfigError
from toolkit.runs.files import RUN_FILES

EVIL = "</script><script>alert(1)</script><b title=\"'&"


class Page(HTMLParser):
    """Ids of sections, names of elements and what they load; the data and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections: list[str] = []
        self.elements: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str | None] = []
        self.data, self.text, self._inside = "", "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        self.elements.append(tag)
        self._inside = "data" if known.get("id") == "curves" else tag
        self.ids += [known["id"]] if "id" in known else []
        if tag == "section":
            self.sections.append(known["id"] or "")
        for name, value in attrs:
            if name in ("src", "href", "data", "srcset", "action") and not value.startswith("#"):
                self.loads.append(value)

    def handle_data(self, data: str) -> None:
        if self._inside == "data":
            self.data += data
        elif self._inside not in ("script", "style"):
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""


def page(*folders: Path) -> Page:
    return Page(html(read_report(folders)))


def curves(of: Page, section: str, title: str) -> list[dict]:
    charts = json.loads(of.data)["charts"][section]
    return next(chart["curves"] for chart in charts if chart["title"].startswith(title))


def add(folder: Path, file: str, *lines: dict) -> None:
    with (folder / file).open("a") as opened:
        opened.writelines(json.dumps(line) + "\n" for line in lines)


def full(root: Path, name: str = "one", **more) -> Path:
    """A run of two attempts with something of every kind."""
    losses = [4.0, 3.0, 2.0, 1.5]
    folder = make_run(root, name, losses=losses, val={2: 3.125, 4: 2.25}, attempts=2, **more)
    lines = [json.loads(line) for line in (folder / RUN_FILES.train_metrics).open()]
    for line in lines:
        line |= {"lr": 1e-3, "grad_norm": 1.0, "time": line["time"] + 60 * (line["step"] > 2)}
        line |= {"instances/web": 3 * line["step"], "instances/code": line["step"]}
    (folder / RUN_FILES.train_metrics).write_text("".join(f"{json.dumps(x)}\n" for x in lines))
    add(
        folder,
        RUN_FILES.network_metrics,
        *({"step": s, "grad_norm/blocks.0": 0.5, "grad_norm/total": 1.0} for s in (1, 4)),
    )
    add(folder, RUN_FILES.system_metrics, {"step": 1, "time": 1.7e9 + 1, "gpu0_power_w": 300.0})
    add(folder, RUN_FILES.samples, {"step": 4, "prompt": "Once", "text": " upon <a> time"})
    saved = folder / "checkpoints" / "step4"
    saved.mkdir()
    (saved / ".metadata.json").write_text(
        '{"step": 4, "tokens": 400, "scores": {"val/loss": 2.25}}'
    )
    (folder / RUN_FILES.origins).write_text('{"seed": "--seed=0"}')
    return folder


def test_every_section_is_there_and_nothing_is_loaded(tmp_path):
    found = page(full(tmp_path))
    assert found.sections == [name for name in SECTIONS if name != "differences"]
    assert not found.loads
    assert len({*found.ids}) == len(found.ids)
    assert not {"link", "img", "iframe", "object"} & {*found.elements}
    text = html(read_report([tmp_path / "exp" / "one"]))
    style = text.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert not re.search(r"fetch\(|XMLHttpRequest|https?://|import\(", text)
    assert "default-src 'none'" in text


def test_the_curves_and_tables_say_what_the_metrics_say(tmp_path):
    found = page(full(tmp_path))
    train, val = curves(found, "loss", "Loss")
    assert (train["step"], train["value"]) == ([1, 2, 3, 4], [4.0, 3.0, 2.0, 1.5])
    assert train["tokens"] == [100, 200, 300, 400]
    assert train["time"] == [0.0, 1.0, 62.0, 63.0]
    assert (train["few"], train["exact"]) == (True, True)
    assert (val["few"], val["exact"], val["dash"]) == (True, True, 1)
    assert "dash" not in train
    assert (val["label"], val["value"], val["tokens"]) == ("val", [3.125, 2.25], [200, 400])
    layers = curves(found, "norms", "grad_norm by layer")
    assert [(c["label"], c["value"]) for c in layers] == [
        ("blocks.0", [0.5, 0.5]),
        ("total", [1.0, 1.0]),
    ]
    web, _ = curves(found, "data", "Share")
    assert web["value"] == [0.75] * 4
    attempts = json.loads(found.data)["attempts"][0]
    assert [(n, b["step"], e["step"]) for n, b, e in attempts] == [(1, 1, 2), (2, 3, 4)]
    for words in ("attempt 1 ended: stopped (SIGINT)", "upon <a> time", "--seed=0", "75.00%"):
        assert words in found.text
    assert "val/loss 2.25" in found.text
    assert "gpu0" in found.data


def test_a_killed_attempt_is_an_interruption_after_its_last_kept_step(tmp_path):
    folder = full(tmp_path)
    status = json.loads((folder / RUN_FILES.status).read_text())
    status["attempts"][0] |= {"state": "dead", "exit_reason": None, "step": 9}
    (folder / RUN_FILES.status).write_text(json.dumps(status))
    found = read_report([folder])
    (gap,) = found.runs[0].throughput.gaps
    assert gap.after_step == 2
    assert next(iter(found.runs[0].throughput.by_reason)) == "interruptions"
    assert gap.reason.startswith("attempt 1 ended: dead, 7 steps after the last kept one done")
    text = html(found)
    assert "1 to 9</td><td>7</td><td>dead</td><td>ended without a word" in text


def test_what_runs_are_called_and_say_is_text(tmp_path):
    folder = full(tmp_path, "x", config={"run": {"name": "x"}, "description": EVIL})
    status = json.loads((folder / RUN_FILES.status).read_text())
    status |= {"name": EVIL, "message": EVIL}
    (folder / RUN_FILES.status).write_text(json.dumps(status))
    (folder / RUN_FILES.notes).write_text(json.dumps({"tags": [EVIL], "note": EVIL}))
    add(folder, RUN_FILES.samples, {"step": 5, "prompt": EVIL, "text": EVIL})
    add(folder, RUN_FILES.eval_metrics, {"step": 5, "name": EVIL, "loss": 1.0})
    found = page(folder)
    assert found.elements.count("script") == 2
    assert found.text.count("alert(1)") >= 6
    assert json.loads(found.data)["runs"] == [EVIL]


def test_secrets_are_hidden(tmp_path):
    keys = ("abcdef0123456789", "fedcba9876543210")
    folders = [
        make_run(tmp_path, key[0], config={"run": {"name": key[0]}, "tracker": {"api_key": key}})
        for key in keys
    ]
    status = json.loads((folders[0] / RUN_FILES.status).read_text())
    status["message"] = f"refused: token={keys[1]}"
    (folders[0] / RUN_FILES.status).write_text(json.dumps(status))
    command = {"argv": ["toolkit", "train", "--token", keys[1]], "cwd": "/x\nrm -rf ~"}
    (folders[0] / RUN_FILES.command).write_text(json.dumps(command))
    (folders[0] / RUN_FILES.git).write_text('{"commit": "x; rm -rf ~"}')
    text = page(*folders).text
    assert text.count("***") >= 5
    assert not [key for key in keys if key in text]
    assert "git checkout 'x; rm -rf ~'" in text  # lines that people paste
    assert "\nrm -rf" not in text


def test_metrics_of_every_name_are_drawn_up_to_a_number(tmp_path):
    folder = full(tmp_path)
    own = {f"mine{n:02}": 1.0 for n in range(50)}
    with (folder / RUN_FILES.train_metrics).open("a") as file:
        file.write(json.dumps({"step": 5, "loss": 1.0, **own}) + "\n")
    found = page(folder)
    charts = json.loads(found.data)["charts"]
    assert [chart["title"] for chart in charts["other"]] == [f"mine{n:02}" for n in range(40)]
    assert "10 more are not drawn" in found.text


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ([], "No throughput was recorded"),
        ([2.5], "2.5"),
        (["nan", "inf", 3.0], "steps whose loss is no number"),
        (["nan", "nan"], "No evaluation was recorded"),
        ([1e308, -1e308, 1.0], "1"),
    ],
)
def test_a_run_of_little_is_a_page_and_pictures(tmp_path, losses, words):
    pytest.importorskip("PIL")
    folder = make_run(tmp_path, "one", losses=losses, end=None if not losses else "failed")
    found = page(folder)
    assert words in found.text
    assert len(found.sections) == len(SECTIONS) - 1
    assert "NaN" not in found.data
    lines = (folder / RUN_FILES.train_metrics).read_text().splitlines(keepends=True)
    late = [line.replace('"time": 17', '"time": 18', 1) for line in lines[:1]]  # a clock set back
    (folder / RUN_FILES.train_metrics).write_text("".join(late + lines[1:]))
    for axis in ("step", "time"):
        write_pngs(read_report([folder]), tmp_path / "png", axis=axis)


def test_several_runs_share_charts_and_are_compared(tmp_path):
    two = full(tmp_path, "two", config={"run": {"name": "two"}, "seed": 7})
    both = html(read_report([full(tmp_path), two]))
    found = Page(both)
    assert "<td><b>" not in both.partition('id="differences"')[0]  # the same losses
    assert both.count("<tr><th>steps</th>") == 1
    assert found.text.count("No difference:") == 1
    assert found.sections == [*SECTIONS]
    assert [c["run"] for c in curves(found, "loss", "Loss")] == [0, 1, 0, 1]
    assert [c["run"] for c in curves(found, "norms", "grad_norm, whole")] == [0, 1]
    assert "bit for bit, in all 4 steps" in found.text
    assert "seed" in found.text.partition("where the losses part")[0]
    with pytest.raises(ConfigError, match="twice"):
        read_report([two, two])


def test_only_losses_norms_of_gradients_and_speeds_of_many_points_are_smoothed(tmp_path):
    folder = make_run(tmp_path, "one", losses=[1.0], config={
        "dataset": {"dataset_name": "tales", "tokenizer": {"type": "bpe", "vocab_size": 512}},
        "model": {"num_layers": 2, "d_model": 8},
        "trainer": {"max_duration": {"value": 99, "unit": "steps"}},
    })  # fmt: skip
    (folder / RUN_FILES.train_metrics).write_text("")
    smooth = ("loss", "grad_norm", "tokens_per_second", "mfu")
    exact = ("lr", "skipped", "data_loading_pct", "peak_memory_gb", "my_own")
    lines = [
        {"step": s, "tokens": 10 * s, "time": 1.7e9 + s, "epoch": s / 10}
        | dict.fromkeys((*smooth, *exact), s % 2 + 0.5)
        for s in range(1, 31)
    ]
    add(folder, RUN_FILES.train_metrics, *lines)
    add(folder, RUN_FILES.system_metrics, *({"step": s, "cpu_pct": s} for s in range(1, 31)))
    found = page(folder)
    charts = [one for all_ in json.loads(found.data)["charts"].values() for one in all_]
    drawn = [one["curves"][0] for one in charts]
    assert (len(drawn), sum("exact" not in one for one in drawn)) == (10, len(smooth))
    assert not any("few" in one for one in drawn)
    for words in ("30 (asked for: 99 steps)", "2 x 8", "tales/", "bpe, 512", "about 100", "3.00"):
        assert words in found.text


def test_a_long_run_of_many_layers_is_small_and_keeps_its_extremes(tmp_path):
    folder = make_run(tmp_path, "long", losses=[1.0])
    steps = 20_000
    noise = np.random.default_rng(0).normal(size=steps)
    noise[[777, 15_000]] = 50.0, -50.0
    lines = (
        {"step": s, "tokens": s * 10, "time": 1.7e9 + s, "loss": v, "lr": v / 3, "grad_norm": v / 7}
        for s, v in enumerate(noise.tolist(), 1)
    )
    (folder / RUN_FILES.train_metrics).write_text("")
    add(folder, RUN_FILES.train_metrics, *lines)
    layers = [f"{kind}/blocks.{n}" for kind in ("grad_norm", "weight_norm") for n in range(64)]
    add(
        folder,
        RUN_FILES.network_metrics,
        *({"step": s, **dict.fromkeys(layers, 1 / s)} for s in range(1, 2_000, 4)),
    )
    out = tmp_path / "out.html"
    assert write_html(read_report([folder]), out) < 3e6
    (loss,) = curves(Page(out.read_text()), "loss", "Loss")
    assert (max(loss["value"]), min(loss["value"])) == (50.0, -50.0)
    assert loss["step"][loss["value"].index(50.0)] == 778
    assert abs(np.mean(loss["means"]["value"])) < 0.05
    assert len(curves(Page(out.read_text()), "norms", "weight_norm")) == 40


def test_the_command_writes_a_page_of_a_run_that_trains_and_pictures(tmp_path, capsys):
    pytest.importorskip("PIL")
    full(tmp_path, end=None)
    out, png = tmp_path / "r.html", tmp_path / "png"
    args = ["report", "one", "--root", str(tmp_path), "--out", str(out), "--png", str(png)]
    assert run(args) == 0
    assert "pictures" in capsys.readouterr().out
    assert "<!doctype html>" in out.read_text()[:20]
    names = {path.name for path in png.iterdir()}
    assert {"lr-Learning-rate.png", "norms-grad_norm-by-layer.png"} <= names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in png.iterdir())
    assert run(args) == 0  # in the place of the page that is there
    assert "in the place of what was there" in capsys.readouterr().out
    assert run([*args[:-2], "--axis", "time"]) == 2
    assert "--axis belongs to --png" in capsys.readouterr().err
    config = tmp_path / "my.json"
    config.write_text("{}")
    for other, problem in ((tmp_path / "no" / "x", "cannot be written"), (config, "is no report")):
        assert run(["report", "one", "--root", str(tmp_path), "--out", str(other)]) == 2
        assert problem in capsys.readouterr().err
    assert config.read_text() == "{}"


def test_the_board_lists_runs_serves_their_pages_and_nothing_else(tmp_path, capsys):
    ids = [read_report([full(tmp_path, name)]).runs[0].facts.id for name in ("one", "two")]

    def get(path: str, host: str = "localhost") -> tuple[int, str]:
        client = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
        client.request("GET", path, headers={"Host": f"{host}:{server.server_port}"})
        answer = client.getresponse()
        text = answer.read().decode()
        client.close()
        return answer.status, text

    with BoardServer(str(tmp_path)) as server:
        assert server.server_address[0] == "127.0.0.1"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            status, text = get("/")
            assert status == 200
            assert all(f'href="/report?run={one}"' in text for one in ids)
            assert Page(get(f"/report?run={ids[0]}&run={ids[1]}")[1]).sections == [*SECTIONS]
            assert get("/", host="elsewhere.example")[0] == 403
            assert get("/", host="LocalHost")[0] == 200
            missing = ("/report", "/report?run=00000000", "/report?run=..", "/../etc/passwd")
            for path in (*missing, "http://[x/", "/report?run=%00"):
                assert get(path)[0] == 404
            broken = Path(read_report([tmp_path / "exp" / "two"]).runs[0].facts.folder)
            (broken / RUN_FILES.train_metrics).unlink()
            (broken / RUN_FILES.train_metrics).mkdir()
            assert get(f"/report?run={ids[1]}")[0] == 404
            with socket.create_connection(("127.0.0.1", server.server_port)) as leaving:
                leaving.sendall(b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n")
                leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            assert get("/")[0] == 200
            with pytest.raises(ConfigError, match="cannot listen"):
                BoardServer(str(tmp_path), port=server.server_port)
        finally:
            server.shutdown()
            thread.join()
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no browser")
def test_a_browser_draws_the_curves(tmp_path):
    out = tmp_path / "r.html"
    folder = full(tmp_path)
    constant = ({"step": s, "cpu_pct": 20.1} for s in range(50))  # whose means differ by rounding
    add(folder, RUN_FILES.system_metrics, *constant)
    write_html(read_report([folder]), out)
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000",
        "--dump-dom", out.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.count("<canvas") >= 5
    assert "0.6</output>" in done.stdout  # written by the last function of the script
