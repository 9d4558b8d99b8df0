"""What a run starts from or leaves as it is: named by content in its checkpoints; on resume another one is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import stdit
from stdit.diffusion.solvers import unipc_config, write_scheduler
from stdit.errors import StditError
from stdit.models.transformer import STDiT, TransformerConfig
from stdit.text.encoders import TextEncoder
from stdit.text.small import build_word_tokenizer, small_umt5
from stdit.training.config import differences, load_config, to_dict
from stdit.training.engine.parallel import World
from stdit.training.setup.frozen import check_frozen, frozen_parts
from stdit.training.setup.resolve import resolve

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A model folder with an image encoder's folder beside the rest; no part of it is run."""
    folder = tmp_path / "model"
    sizes = {"dim": 24, "heads": 2, "layers": 1, "ffn_dim": 24, "frequency_dim": 16}
    config = TransformerConfig.preset("toy", **sizes, in_channels=4, out_channels=4, text_dim=16)
    stdit.save_transformer(STDiT(config), folder / "transformer")
    tokenizer = build_word_tokenizer(["a red circle"])
    TextEncoder(small_umt5(len(tokenizer), 16, 1, 2), tokenizer).save(folder / "text_encoder", folder / "tokenizer")
    shutil.copytree(tiny / "vae", folder / "vae")
    write_scheduler(unipc_config(3.0), folder / "scheduler")
    shutil.copytree(folder / "text_encoder", folder / "image_encoder")  # as little as its content matters here
    (folder / "image_processor").mkdir()
    (folder / "image_processor" / "preprocessor_config.json").write_text("{}")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    return folder


def config_of(tmp_path: Path, model: Path, **more: Any) -> Any:
    place = tmp_path / "c.yaml"
    place.write_text(json.dumps({"model": {"init": str(model), **more}}))
    return resolve(load_config(place, []))


def checkpoint(frozen: dict[str, str], **state: Any) -> Any:
    return SimpleNamespace(path=Path("step-1"), state={"frozen": frozen, **state})


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def rewrite(name: str, value: Any) -> Callable[[Path], None]:
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), name: value})) and None


@pytest.mark.parametrize("more", [{}, {"trainable": ["blocks.0.*"]}, {"lora": {"rank": 2}}])
@pytest.mark.parametrize(
    ("file", "change", "part"),
    [
        ("transformer/diffusion_pytorch_model.safetensors", flip, "transformer"),
        ("transformer/config.json", rewrite("eps", 1e-5), "transformer's config"),
        ("vae/diffusion_pytorch_model.safetensors", flip, "VAE"),
        ("text_encoder/model.safetensors", flip, "text encoder"),
        ("tokenizer/tokenizer.json", rewrite("version", "1.1"), "tokenizer"),
        ("model_index.json", rewrite("_class_name", "LTXPipeline"), "treatment of texts"),
        ("scheduler/scheduler_config.json", rewrite("flow_shift", 5.0), "scheduler"),
        ("image_encoder/model.safetensors", flip, "image encoder"),
        ("image_processor/preprocessor_config.json", rewrite("size", 3), "image processor"),
    ],
)
def test_each_part_is_named_where_it_has_changed(
    tmp_path: Path, model: Path, more: dict[str, Any], file: str, change: Callable[[Path], None], part: str
) -> None:
    config = config_of(tmp_path, model, **more)
    before = check_frozen(config, None, ALONE, print)
    assert check_frozen(config, checkpoint(before), ALONE, print) == before
    change(model / file)
    with pytest.raises(StditError, match="step-1 goes with other weights") as caught:
        check_frozen(config_of(tmp_path, model, **more), checkpoint(before), ALONE, print)
    said = str(caught.value)
    now = frozen_parts(config_of(tmp_path, model, **more))[part].content
    assert f"the {part}, {model}, has changed since: {now} now, the run began with {before[part]}" in said
    assert "\n" not in said


def test_a_folder_may_be_moved_and_one_that_is_new_or_gone_is_told(tmp_path: Path, model: Path) -> None:
    config = config_of(tmp_path, model)
    before = check_frozen(config, None, ALONE, print)
    shutil.copytree(model, tmp_path / "copy")  # of another time
    moved = config_of(tmp_path, tmp_path / "copy")
    assert check_frozen(moved, checkpoint(before), ALONE, print) == before
    assert differences(to_dict(config), moved, named=True) == [] != differences(to_dict(config), moved)
    moved.text.path = None
    assert [line.split(":")[0] for line in differences(to_dict(config), moved, named=True)] == ["text.path"]
    shutil.rmtree(model / "image_encoder")
    with pytest.raises(StditError, match="the image encoder is gone"):
        check_frozen(config, checkpoint(before), ALONE, print)
    del before["VAE"]
    with pytest.raises(StditError, match=r"the VAE, .*, has changed since: \w+ now, the run began without one"):
        check_frozen(config, checkpoint(before), ALONE, print)


def test_checkpoints_of_an_earlier_stdit_go_on_and_say_so(tmp_path: Path, model: Path) -> None:
    config, said = config_of(tmp_path, model), list[str]()
    old: Any = SimpleNamespace(path=Path("step-1"), state={"base": None})
    assert set(check_frozen(config, old, ALONE, said.append)) > {"VAE", "tokenizer"}
    assert "an earlier stdit wrote it" in said[0]
    base = frozen_parts(config)["transformer"].content
    old.state["base"] = base  # of adapters
    check_frozen(config, old, ALONE, said.append)
    assert len(said) == 1
    old.state["base"] = "0" * 64
    with pytest.raises(StditError, match="goes with other weights: the transformer"):
        check_frozen(config, old, ALONE, said.append)


def test_a_large_files_hash_is_remembered_until_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hashlib
    import os

    from stdit.weights import identity

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(identity, "REMEMBERED", 4)
    monkeypatch.setattr(identity, "SETTLED", -1.0)
    file, calls = tmp_path / "large.safetensors", list[str]()
    wanted = {content: hashlib.sha256(content).hexdigest() for content in (b"first", b"other")}
    real = identity.sha256_of
    monkeypatch.setattr(identity, "sha256_of", lambda opened: (calls.append(opened.name), real(opened))[1])

    def found() -> str:
        identity._file_hash.cache_clear()  # as another process
        return identity.file_identity(file)

    file.write_bytes(b"first")
    assert found() == found() == wanted[b"first"] and len(calls) == 1
    status = os.stat(file)
    file.write_bytes(b"other")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # of the same size and time
    assert found() == wanted[b"other"] and len(calls) == 2
    monkeypatch.setattr(identity, "SETTLED", 10.0)  # what was just written may be written again in the same tick
    file.write_bytes(b"first")
    assert found() == found() == wanted[b"first"] and len(calls) == 4
