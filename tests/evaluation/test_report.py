"""report.html: whole, self-contained, and never in the way of a run that lacks something."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser

import pytest

from stdit.data.decode.write import contact_sheet, write_video
from stdit.data.toy import ToySpec, held_out_prompts, render
from stdit.errors import StditError
from stdit.evaluation.harness import summarise
from stdit.evaluation.report import write_report
from stdit.evaluation.toy import as_json, read_clip, score_readings


class Page(HTMLParser):
    """What a page loads, shows and leaves open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources, self.tags, self.words, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "img", "br", "path", "use", "rect"):
            self.open.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "my-run"
    run.mkdir()
    start = {"objective": "flow", "ranks": 2, "parameters": 1_764_000, "steps": 40, "clips": 900, "device": "cpu"}
    lines = [{"kind": "start", "step": 0, "time": 0, **start, "torch": "2.15", "stdit": "0.1.0"}]
    lines += [
        {"kind": "train", "step": step, "loss": 1 / step if step != 20 else None, "lr": 1e-3, "step_seconds": 3.0}
        for step in range(10, 41, 10)
    ]
    lines.insert(3, {"kind": "eval", "step": 20, "time": 1, "psnr": 31.5, "loss": 0.4321, "samples": []})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tra')
    (run / "config.yaml").write_text("run:\n  path: <b>bold & brave</b>\n")
    prompts = held_out_prompts(3)
    clips = [render(ToySpec.parse(prompt), 64, 48, 5) for prompt in prompts]
    for step in range(5, 45, 5):
        folder = run / "samples" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        write_video(folder / "a.mp4", clips[0], 8)
        about = [{"file": f"samples/{folder.name}/a.mp4", "prompt": "a <i>red</i> dot"}]
        about.append({"file": "../../outside.mp4", "prompt": "from outside"})
        (folder / "samples.json").write_text(json.dumps({"step": step, "samples": about}))
    write_video(run.parent / "outside.mp4", clips[1], 8)
    readings = [read_clip(clips[0]), read_clip(clips[0]), read_clip(clips[2])]
    scores = as_json(score_readings(prompts, readings))
    write_video(run / "0.mp4", clips[0], 8)
    contact_sheet(clips, run / "sheet.png")
    one = {"kind": "trained", "shape": "64x48x5", "vae_psnr": 30.25, "sheet": "sheet.png", "samples": scores}
    one |= {"vae": scores, "rendered": scores, "shuffled": scores}
    one["clips"] = [
        {
            "file": "0.mp4",
            "prompt": prompt,
            "reading": {name: getattr(reading, name) for name in reading.right(ToySpec.parse(prompt))},
            "right": reading.right(ToySpec.parse(prompt)),
        }
        for prompt, reading in zip(prompts, readings)
    ]
    sets = [one, {**one, "shape": "48x64x5"}]
    result = {"format": 1, "sets": sets, "summary": summarise(sets), "vae": None}
    result["settings"] = {"prompts": 3, "steps": 30, "guidance": 5.0}
    (run / "evaluation.json").write_text(json.dumps(result))
    return run


def test_the_report_is_one_whole_file_that_loads_nothing(run):
    path = write_report(run)
    assert path == run / "report.html" and [p.name for p in run.glob(".*")] == []
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    assert page.sources and all(source.startswith(("data:", "#")) for source in page.sources)
    assert not re.search(r"url\((?!#)|@import|<link", path.read_text())


def test_the_report_says_what_the_run_folder_holds(run):
    page = Page(write_report(run).read_text())
    told = ("my-run", "1.76M", "diffusion transformer", "cpu × 2 ranks", "held-out loss 0.4321", "31.5 dB", "30.2 dB")
    for words in (*told, "2 min"):
        assert words in page.text, words
    assert "learning rate" in page.text and "model FLOPs" not in page.text  # what was not measured has no curve
    steps = re.findall(r"step (\d+)", page.text)
    assert [steps[0], steps[5]] == ["5", "40"]  # the first and the last of eight, six shown
    assert (
        page.tags.count("video") == 6 + 2 * 3
        and sum(source.startswith("data:image/png") for source in page.sources) == 2
    )
    scores = json.loads((run / "evaluation.json").read_text())["summary"]["trained"]["samples"]
    assert f"{100 * scores['shape']['share']:.0f} %" in page.text and "✗" in page.text and "✓ right" in page.text


def test_embedded_clips_are_the_files_and_none_from_outside(run):
    page = Page(write_report(run).read_text())
    videos = {base64.b64decode(source.split(",")[1]) for source in page.sources if source.startswith("data:video")}
    assert (run / "0.mp4").read_bytes() in videos
    assert (run.parent / "outside.mp4").read_bytes() not in videos
    assert "<b>bold & brave</b>" in page.text and "a <i>red</i> dot" in page.text  # shown, not obeyed


@pytest.mark.parametrize("keep", [[], ["metrics.jsonl"], ["evaluation.json"], ["samples"], ["broken"]])
def test_what_is_missing_is_left_out(run, tmp_path, keep):
    for name in keep:
        if name == "broken":
            (tmp_path / "metrics.jsonl").write_text(
                'nonsense\n[1]\n{"kind": "train"}\n{"kind": "start", "step": 0}\n{"kind": "train", "step": 1}\n'
            )
            (tmp_path / "evaluation.json").write_text("{")
            (tmp_path / "samples/step-00000001").mkdir(parents=True)
            (tmp_path / "samples/step-00000001/samples.json").write_text("[]")
        else:
            (tmp_path / name).symlink_to(run / name)
    page = Page(write_report(tmp_path).read_text())
    assert page.open == []
    assert ("holds no metrics" in page.text) == (keep in ([], ["broken"]))


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(StditError, match="not a run folder"):
        write_report(tmp_path / "nowhere")
