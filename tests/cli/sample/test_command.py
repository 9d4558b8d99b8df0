from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sample_runs import PROMPTS, run

from stdit.cli.main import run_command
from stdit.cli.sample.command import sample
from stdit.cli.sample.files import ClipFiles, slug
from stdit.cli.sample.plan import plan_clips
from stdit.cli.sample.rows import ClipSettings
from stdit.data.decode.video import probe, read_frames
from stdit.data.decode.write import write_video
from stdit.errors import StditError
from stdit.models.transformer import Experts, STDiT
from stdit.sampling.pipeline import Pipeline
from stdit.weights.lora.adapters import Adapter, Pair
from stdit.weights.lora.write import write_adapter

ROOT = Path(__file__).parents[3]


def test_writes_a_video_that_plays_a_sheet_and_the_settings(folder, tmp_path, capsys):
    shape = ["--aspect", "16:9", "--resolution", 32, "--duration", "0.5s"]
    assert run(folder, tmp_path, "--prompt", PROMPTS[0], *shape) == 0
    printed = capsys.readouterr().out
    assert "56x32, 5 frames at 8 fps" in printed  # 8·0.5 = 4 frames, nearest of 1 and 5
    (name,) = (file.stem for file in tmp_path.glob("*.mp4"))
    assert re.fullmatch(r"000-a-red-circle-moves-left-seed0-[0-9a-f]{8}", name)
    found = probe(str(tmp_path / f"{name}.mp4"))
    assert (found.width, found.height, found.frames, found.fps, found.codec) == (56, 32, 5, 8, "h264")
    assert (tmp_path / f"{name}.png").is_file()
    settings = json.loads((tmp_path / f"{name}.json").read_text())
    wanted = {"prompt": PROMPTS[0], "size": "56x32", "frames": 5, "fps": 8, "steps": 2, "guidance": 2, "seed": 0}
    assert wanted.items() <= settings.items()


def test_prompts_from_a_file_are_the_clips_of_the_pipeline(folder, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n")
    assert run(folder, tmp_path / "out", "--prompts", file, "--frames", 1, "--seed", 3, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert [clip["prompt"] for clip in result["clips"]] == PROMPTS
    expected = Pipeline.load(folder)(PROMPTS, frames=1, steps=2, guidance=2, seed=3)
    for clip, frames in zip(result["clips"], expected):
        assert clip["video"] is None  # one frame is an image
        assert np.array_equal(read_frames(clip["image"], 1), frames)


def test_a_prompt_that_is_cut_is_told_once_with_what_is_dropped(folder, tmp_path, capsys):
    prompt = "a red circle moves left " * 4 + "and stops"
    assert run(folder, tmp_path, "--prompt", prompt, "--frames", 1, "--json") == 0
    captured = capsys.readouterr()
    assert captured.err.count("is dropped") == 1
    assert "23 tokens, and 16 are used: 'a red circle moves left and stops' is dropped" in captured.err
    assert json.loads(captured.out)["clips"][0]["prompt"] == prompt


def test_a_frame_or_the_end_of_a_video_is_known(folder, tmp_path, capsys):
    clip = np.zeros((24, 60, 100, 3), np.uint8)
    clip[:, :, :, 0] = np.arange(24, dtype=np.uint8)[:, None, None] * 10  # frame number in red
    write_video(tmp_path / "in.mp4", clip, 8, crf=0)
    assert run(folder, tmp_path / "a", "--prompt", "a", "--video", tmp_path / "in.mp4", "--size", "48x32") == 0
    assert "first 5 known" in capsys.readouterr().out
    assert run(folder, tmp_path / "b", "--prompt", "a", "--video", tmp_path / "in.mp4", "--video-frames", 9) == 1
    assert "nothing is left" in capsys.readouterr().err
    assert run(folder, tmp_path / "c", "--prompt", "a", "--image", next((tmp_path / "a").glob("000-a-*.png"))) == 0
    assert "first frame known" in capsys.readouterr().out
    settings = json.loads(next((tmp_path / "c").glob("*.json")).read_text())
    assert settings["known_frames"] == 1 and "/000-a-seed0-" in settings["image"]

    (planned,) = plan_clips(Pipeline.load(folder), [ClipSettings("", "a", size="48x32", video=tmp_path / "in.mp4")])
    known = planned.known["video"]
    assert known.shape == (5, 32, 48, 3)
    assert np.abs(known[:, 16, 24, 0].astype(int) - np.arange(190, 240, 10)).max() <= 8  # the last five frames


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        ([], 2, "--prompt TEXT or --prompts FILE"),
        (["--prompt", "a", "--size", "50x32"], 1, "48x32 or 56x32"),
        (["--prompt", "a", "--size", "wide"], 2, "'wide'"),
        (["--prompt", "a", "--size", "48x32x9"], 2, "--frames"),
        (["--prompt", "a", "--size", "48x32", "--aspect", "1:1"], 2, "leave out"),
        (["--prompt", "a", "--aspect", "wide"], 2, "16:9"),
        (["--prompt", "a", "--frames", "8"], 1, "nearest are 5 and 9"),
        (["--prompt", "a", "--duration", "long"], 2, "3s or 2.5"),
        (["--prompt", "a", "--duration", "1", "--frames", "5"], 2, "give one"),
        (["--prompt", "a", "--fps", "0"], 2, "0.001 to 1000"),
        (["--prompt", "a", "--fps", "nan"], 2, "0.001 to 1000"),
        (["--prompt", "a", "--fps", "1e300"], 2, "0.001 to 1000"),
        (["--prompt", "a", "--fps", "0.0001"], 2, "0.001 to 1000"),
        (["--prompt", "a", "--shift", "nan"], 2, "--shift"),
        (["--prompt", "a", "--shift", "inf"], 2, "--shift"),
        (["--prompt", "a", "--shift", "1e300"], 2, "--shift"),
        (["--prompt", "a", "--guidance", "nan"], 2, "--guidance"),
        (["--prompt", "a", "--guidance", "1e300"], 2, "--guidance"),
        (["--prompt", "a", "--guidance-2", "-inf"], 2, "--guidance-2"),
        (["--prompt", "a", "--seed", "9" * 30], 2, "--seed"),
        (["--prompt", "a", "--index", "-1"], 2, "--index"),
        (["--prompt", "a", "--frames", "0"], 2, "--frames"),
        (["--prompt", "a", "--aspect", "0.0001:9"], 2, "1:1000"),
        (["--prompt", "a", "--size", "99999999x16"], 2, "six digits"),
        (["--prompt", "a", "--size", "960000x960000"], 1, "GB of memory"),
        (["--prompt", "a", "--duration", "9" * 400], 2, "--duration"),
        (["--prompt", "a\udcff"], 1, "character 2"),
        (["--prompt", "a", "--out="], 2, "--out is empty"),
        (["--prompt", "a", "--out", " "], 2, "--out is empty"),
        (["--prompt", "a", "--device", "meta"], 2, "--device 'meta'"),
        (["--prompt", "a", "--solver", "unpic"], 1, "'unipc'"),
        (["--prompt", "a", "--dtype", "half"], 2, "bfloat16"),
        (["--prompt", "a", "--memory", "much"], 2, "8GB, 500MB or 2GiB"),
        (["--prompt", "a", "--memory", "1kB"], 1, "Give at least"),
        (["--prompt", "a", "--device", "tpu"], 2, "--device 'tpu'"),
        (["--prompt", "a", "--resolution", "0"], 2, "--resolution"),
        (["--prompt", "a", "--image", "nowhere.png"], 1, "nowhere.png"),
        (["--prompt", "a", "--image", "a.png", "--video", "b.mp4"], 2, "give one"),
        (["--prompt", "a", "--video-frames", "5"], 2, "--video"),
        (["--prompts", "nowhere.txt"], 1, "nowhere.txt"),
        (["--prompt", "a", "--steps", "many"], 2, "--steps"),
    ],
)
def test_mistakes_are_one_message(folder, tmp_path, capsys, args, status, message):
    assert run(folder, tmp_path, *args) == status
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed
    assert not list(tmp_path.glob("*.mp4"))


def test_too_small_a_memory_is_said_before_sampling(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Pipeline, "sample_together", lambda *args, **kwargs: pytest.fail("sampled"))
    assert run(folder, tmp_path, "--prompt", "a", "--memory", "1kB") == 1
    assert "memory 1000: " in capsys.readouterr().err


def test_an_empty_line_of_a_prompt_file_is_named(folder, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\nthree\n")
    assert run(folder, tmp_path / "out", "--prompts", file) == 1
    assert "prompts.txt, line 2 is empty" in capsys.readouterr().err
    assert run(tmp_path, tmp_path / "out", "--prompt", "a") == 1
    assert "not a model folder" in capsys.readouterr().err
    file.write_text("")
    assert run(folder, tmp_path / "out", "--prompts", file) == 1
    assert "is empty" in capsys.readouterr().err


def test_loras_are_added_with_their_weights(folder, tmp_path, capsys):
    pipeline = Pipeline.load(folder)
    config, name = pipeline.transformer.config, "blocks.0.ffn.0.weight"
    generator = torch.Generator().manual_seed(0)
    pair = Pair(torch.randn(2, 24, generator=generator), torch.randn(32, 2, generator=generator), 1.0)
    write_adapter(Adapter({name: pair}), tmp_path / "a.safetensors", config, "kohya")
    write_adapter(Adapter({name: pair}), tmp_path / "b:2", config)
    (tmp_path / "b:2").rename(tmp_path / "b:2.safetensors")
    words = ["--prompt", PROMPTS[0], "--frames", 1]
    loras = ["--lora", f"{tmp_path / 'a.safetensors'}:0.75", "--lora", tmp_path / "b:2.safetensors"]
    assert run(folder, tmp_path / "with", *words, *loras) == 0
    with torch.no_grad():
        pipeline.transformer.state_dict()[name] += (0.75 + 1) * 0.5 * pair.up @ pair.down
    pipeline.save(tmp_path / "merged")
    for where, out in ((tmp_path / "merged", "merged"), (folder, "without")):
        assert run(where, tmp_path / out, *words) == 0
    images = [read_image(next((tmp_path / out).glob("*.png"))) for out in ("with", "merged", "without")]
    assert np.abs(images[0] - images[1]).max() <= 1 < np.abs(images[0] - images[2]).max()
    assert json.loads(next((tmp_path / "with").glob("*.json")).read_text())["loras"][0][1] == 0.75
    capsys.readouterr()
    assert run(folder, tmp_path / "out", *words, "--lora", "no.safetensors:1") == 1
    assert "no.safetensors is not a file" in capsys.readouterr().err
    assert run(folder, tmp_path / "out", *words, "--lora", f"{tmp_path / 'a.safetensors'}:inf") == 2
    deeper = Adapter({name: pair, name.replace("0", "1", 1): pair})  # for a model of two blocks
    write_adapter(deeper, tmp_path / "c.safetensors", replace(config, layers=2), "kohya")
    assert run(folder, tmp_path / "part", *words, "--lora", tmp_path / "c.safetensors") == 1
    assert "--lora-partly" in capsys.readouterr().err
    assert run(folder, tmp_path / "part", *words, "--lora", tmp_path / "c.safetensors", "--lora-partly") == 0
    assert "Left out, because this model does not have them: blocks_*_ffn_0" in capsys.readouterr().err
    for out, part in (("part", True), ("with", False)):
        command = json.loads(next((tmp_path / out).glob("*.json")).read_text())["command"]
        assert ("--lora-partly" in command.split()) == part


def names(folder: Path, suffix: str = "mp4") -> list[str]:
    return sorted(file.stem for file in folder.glob(f"*.{suffix}"))


def test_no_clip_overwrites_another(folder, tmp_path, capsys):
    few = ["--frames", 1, "--size", "16x16"]
    for prompt, seed in (("红色的狗", 0), ("蓝色的猫在跑", 0), ("a red dog", 0), ("a red dog", 1), ("A red dog.", 0)):
        assert run(folder, tmp_path, "--prompt", prompt, "--seed", seed, *few) == 0
    for more in (["--guidance", 3], ["--negative", "blue"], ["--solver", "euler"], ["--shift", 2], ["--index", 1]):
        assert run(folder, tmp_path, "--prompt", "a red dog", *few, *more) == 0
    made = names(tmp_path, "png")
    assert len(made) == 10 and sum("红色的狗" in name for name in made) == 1
    # the same command again finds its clip and leaves it as it is
    (note,) = tmp_path.glob("*红色的狗*.json")
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in tmp_path.iterdir()}
    capsys.readouterr()
    assert run(folder, tmp_path, "--prompt", "红色的狗", *few) == 0
    assert "was there already" in capsys.readouterr().out
    assert before == {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in tmp_path.iterdir()}
    note.unlink()  # written last: without it the clip is not whole, and is made again
    assert run(folder, tmp_path, "--prompt", "红色的狗", *few) == 0
    assert note.is_file() and len(names(tmp_path, "png")) == 10


def test_other_weights_and_other_known_frames_make_other_names(folder, tmp_path):
    few = ["--prompt", "a", "--frames", 5, "--size", "16x16"]
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    for value in (0, 255):
        Image.new("RGB", (16, 16), (value, 0, 0)).save(tmp_path / "first.png")  # one path, two pictures
        assert run(folder, tmp_path / "out", *few, "--image", tmp_path / "first.png") == 0
    assert run(folder, tmp_path / "out", *few) == run(copy, tmp_path / "out", *few) == 0
    assert len(names(tmp_path / "out")) == 3  # a copy of the model is the same model
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor * 1.001 for name, tensor in tensors.items()}, file, {"format": "pt"})
    assert run(copy, tmp_path / "out", *few) == 0
    assert len(names(tmp_path / "out")) == 4


def test_a_clip_whose_files_changed_is_made_again(folder, tmp_path):
    few = ["--prompt", "a", "--frames", 5, "--size", "16x16"]
    assert run(folder, tmp_path, *few) == 0
    (video,), (note,) = tmp_path.glob("*.mp4"), tmp_path.glob("*.json")
    whole, written = video.read_bytes(), note.read_text()
    for file, content in (
        (video, whole[:-9]),
        (note, "{"),
        (note, "[]"),
        (note, written.replace('"steps": 2', '"steps": 3')),
    ):
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        assert run(folder, tmp_path, *few) == 0
        assert video.read_bytes() == whole and note.read_text() == written


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("../../etc/passwd", "etc-passwd"),
        ('..\\a:b*c?"<>|\n\0', "a-b-c"),
        ("हिन्दी में", "हिन्दी-में"),
        ("Cafe\u0301 und Straße", "café-und-straße"),
        ("\u202egnp.exe", "gnp-exe"),  # turns the reading direction
        ("…!", ""),
        ("狗" * 100, "狗" * 26),
    ],
)
def test_a_name_keeps_letters_of_any_script_and_is_no_path(prompt, wanted):
    assert slug(prompt) == wanted and len(wanted.encode()) <= 80


def test_a_clip_of_a_batch_is_made_again_alone(folder, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\na blue square\na red circle\n")
    few = ["--frames", 1, "--size", "16x16", "--seed", 5]
    assert run(folder, tmp_path / "all", "--prompts", file, *few) == 0
    pictures = {name: read_image(tmp_path / "all" / f"{name}.png") for name in names(tmp_path / "all", "png")}
    first, _, third = (pictures[name] for name in sorted(pictures))
    assert np.abs(first - third).max() > 1  # equal prompts, each with its own noise
    assert run(folder, tmp_path / "one", "--prompts", file, *few, "--index", 2) == 0
    assert run(folder, tmp_path / "alone", "--prompt", "a red circle", *few, "--index", 2) == 0
    note = json.loads((tmp_path / "all" / f"{max(pictures)}.json").read_text())
    words = shlex.split(note["command"])
    assert words[:2] == ["stdit", "sample"]
    assert run_command(sample, [*words[2:-1], f"--out={tmp_path / 'command'}"], prog="sample.py") == 0
    for out in ("one", "alone", "command"):
        assert names(tmp_path / out, "png") == [max(pictures)]
        # a pack of another size rounds otherwise: a step of 255 at most
        assert np.abs(read_image(tmp_path / out / f"{max(pictures)}.png") - third).max() <= 1
    assert run(folder, tmp_path / "one", "--prompts", file, *few, "--index", 3) == 2
    assert "has 3 prompts" in capsys.readouterr().err


def test_the_command_of_a_clip_has_every_option_and_none_is_dropped(tmp_path):
    options = {"guidance": 0.5, "steps": 3, "seed": 0, "lora_partly": True, "shift": None, "video": None}
    words = shlex.split(ClipFiles(tmp_path, "a b", 0, {**options, "loras": [["x.safetensors", 0.5]]}).command())
    assert words == [
        "stdit", "sample", "--prompt=a b", "--index=0", "--guidance=0.5", "--steps=3", "--seed=0", "--lora-partly",
        "--lora=x.safetensors:0.5", f"--out={tmp_path}",
    ]  # fmt: skip
    with pytest.raises(AssertionError, match="--guidance"):
        ClipFiles(tmp_path, "a", 0, {"guidance": {"from": 0.2}, "video": None}).command()


def test_frames_that_are_not_finite_are_an_error_and_no_black_clip(folder, tmp_path, capsys, monkeypatch):
    few = ["--frames", 1, "--size", "16x16"]
    for part, factor, words in (
        ("transformer", 1e37, "latents are not finite at step 1 (noise level "),
        ("transformer", math.nan, "The file is damaged"),
        ("text_encoder", math.inf, "the text encoder's output is not finite for 'a'"),
        ("vae", math.nan, "The file is damaged"),
        ("vae", 1e30, "the VAE's frames are not finite"),
    ):
        bad = Path(shutil.copytree(folder, tmp_path / f"{part}{factor}"))
        (file,) = (bad / part).glob("*.safetensors")
        tensors = load_file(file)
        save_file({name: tensor * factor for name, tensor in tensors.items()}, file, {"format": "pt"})
        assert run(bad, tmp_path / "out", "--prompt", "a", *few) == 1
        assert words in capsys.readouterr().err
        assert not list((tmp_path / "out").iterdir())
    # one prompt of a batch: the others are kept
    true = Pipeline.encode_texts

    def spoiled(self, texts, *more):
        return [text * (1e38 if word == "bad" else 1) for word, text in zip(texts, true(self, texts, *more))]

    monkeypatch.setattr(Pipeline, "encode_texts", spoiled)
    file = tmp_path / "prompts.txt"
    file.write_text("one\nbad\nthree\n")
    assert run(folder, tmp_path / "out", "--prompts", file, *few) == 1
    printed = capsys.readouterr()
    assert "clip 1 (bad): latents are not finite at step 1 (noise level " in printed.err
    assert [name[:5] for name in names(tmp_path / "out", "png")] == ["000-o", "002-t"]


def test_float16_is_named_as_the_usual_cause(folder):
    pipeline = Pipeline.load(folder, dtype=torch.float16)
    with pytest.raises(StditError, match=r"not finite at step 1 .*float16\). .*try --dtype bfloat16"):
        pipeline("a", frames=1, steps=2, noise=torch.full((1, 4, 1, 8, 8), torch.inf), size=(32, 32))


def test_guidance_2_is_not_silently_ignored(folder, tmp_path):
    model = STDiT(Pipeline.load(folder).transformer.config)
    pipeline = Pipeline.load(folder)
    pipeline.transformer = Experts(model, model, 0.9)
    with pytest.raises(StditError, match="guidance_2 3: guidance of 1 or less makes no unconditional"):
        pipeline("a", frames=1, steps=2, guidance=1, guidance_2=3)


@pytest.mark.parametrize("fps", [0.001, 1 / 3, 7.123456789, 24000 / 1001, 1000])
def test_a_file_has_the_frame_rate_that_is_asked_for(tmp_path, fps):
    write_video(tmp_path / "a.mp4", np.zeros((5, 16, 16, 3), np.uint8), fps)
    with av.open(str(tmp_path / "a.mp4")) as file:
        times = [float(frame.pts * frame.time_base) for frame in file.decode(video=0)]
    assert times == pytest.approx([n / fps for n in range(5)], rel=1e-6)


def read_image(path: Path) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(path)).astype(int)


def test_the_script_of_a_clone_shows_its_help():
    done = subprocess.run(
        [sys.executable, "sample.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "--prompt" in done.stdout
