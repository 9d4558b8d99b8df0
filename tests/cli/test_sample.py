from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from stdit.cli.main import run_command
from stdit.cli.sample import sample
from stdit.data.video_io import probe, read_frames, write_video
from stdit.diffusion.solvers import unipc_config
from stdit.models.transformer import STDiT, TransformerConfig
from stdit.pipeline import FolderSettings, Pipeline
from stdit.text.encoders import TextEncoder, build_word_tokenizer, small_umt5
from stdit.vae.autoencoder import CausalVAE, VaeConfig
from stdit.weights.adapters import Adapter, Pair
from stdit.weights.lora_files import write_adapter

ROOT = Path(__file__).parents[2]
PROMPTS = ["a red circle moves left", "A blue square!"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    tokenizer = build_word_tokenizer(PROMPTS)
    config = TransformerConfig(dim=24, heads=2, layers=1, ffn_dim=32, in_channels=4, out_channels=4, text_dim=16)
    sizes = VaeConfig(base_dim=4, dim_mult=(1, 1, 1), num_res_blocks=1, temporal_downsample=(True, True), z_dim=4)
    encoder = TextEncoder(small_umt5(len(tokenizer), 16, 1, 2), tokenizer)
    settings = FolderSettings(fps=8, shapes=("48x32x9",), text_padding=16)
    path = tmp_path_factory.mktemp("model")
    transformer = STDiT(config)
    torch.nn.init.normal_(transformer.head.head.weight, std=0.3)  # a fresh one is 0, and no other weight would matter
    Pipeline(transformer, CausalVAE(sizes), encoder, unipc_config(), settings).save(path)
    return path


def run(folder: Path, out: Path, *args: object) -> int:
    words = ["--model", folder, "--out", out, "--steps", 2, "--guidance", 2, "--device", "cpu", *args]
    return run_command(sample, [str(word) for word in words], prog="sample.py")


def test_writes_a_video_that_plays_a_sheet_and_the_settings(folder, tmp_path, capsys):
    shape = ["--aspect", "16:9", "--resolution", 32, "--duration", "0.5s"]
    assert run(folder, tmp_path, "--prompt", PROMPTS[0], *shape) == 0
    printed = capsys.readouterr().out
    assert "56x32, 5 frames at 8 fps" in printed  # 8·0.5 = 4 frames, nearest of 1 and 5
    name = "000-a-red-circle-moves-left"
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


def test_a_frame_or_the_end_of_a_video_is_known(folder, tmp_path, capsys):
    clip = np.zeros((24, 60, 100, 3), np.uint8)
    clip[:, :, :, 0] = np.arange(24, dtype=np.uint8)[:, None, None] * 10  # frame number in red
    write_video(tmp_path / "in.mp4", clip, 8, crf=0)
    assert run(folder, tmp_path / "a", "--prompt", "a", "--video", tmp_path / "in.mp4", "--size", "48x32") == 0
    assert "first 5 known" in capsys.readouterr().out
    assert run(folder, tmp_path / "b", "--prompt", "a", "--video", tmp_path / "in.mp4", "--video-frames", 9) == 1
    assert "nothing is left" in capsys.readouterr().err
    assert run(folder, tmp_path / "c", "--prompt", "a", "--image", tmp_path / "a/000-a.png") == 0
    assert "first frame known" in capsys.readouterr().out
    settings = json.loads((tmp_path / "c/000-a.json").read_text())
    assert settings["known_frames"] == 1 and settings["image"].endswith("000-a.png")

    from stdit.cli.sample import _known

    pipeline = Pipeline.load(folder)
    known = _known(pipeline, pipeline.shape(), 8, None, tmp_path / "in.mp4", None)["video"]
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
        (["--prompt", "a", "--fps", "0"], 2, "positive"),
        (["--prompt", "a", "--fps", "nan"], 2, "positive"),
        (["--prompt", "a", "--solver", "unpic"], 1, "'unipc'"),
        (["--prompt", "a", "--dtype", "half"], 2, "bfloat16"),
        (["--prompt", "a", "--memory", "much"], 2, "8GB, 500MB or 2GiB"),
        (["--prompt", "a", "--memory", "1kB"], 1, "Give at least"),
        (["--prompt", "a", "--device", "tpu"], 1, "--device 'tpu'"),
        (["--prompt", "a", "--resolution", "0"], 1, "short side 0"),
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
    monkeypatch.setattr(Pipeline, "sample_latents", lambda *args, **kwargs: pytest.fail("sampled"))
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


def read_image(path: Path) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(path)).astype(int)


def test_the_script_of_a_clone_shows_its_help():
    done = subprocess.run(
        [sys.executable, "sample.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "--prompt" in done.stdout
