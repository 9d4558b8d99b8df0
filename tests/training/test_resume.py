"""A run's network is in its checkpoints by every setting: what a later version's presets or families make of the same
config is not gone on with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from references import FAMILIES, randomise
from tiny_runs import ALONE, make_quick

from stdit.errors import StditError
from stdit.models.config import PRESETS
from stdit.text.encoders import TextEncoder
from stdit.text.small import build_word_tokenizer, small_umt5
from stdit.training.config import load_config
from stdit.training.engine.checkpoint import checksum, published
from stdit.training.run import run
from stdit.vae.config import PRESETS as VAE_PRESETS
from stdit.weights.io import load_transformer


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    make_quick(monkeypatch)
    yield


@pytest.fixture
def small(tiny: Path, tmp_path: Path) -> Path:
    """A config of the preset small, made narrower; how many heads it has is the preset's matter."""
    config = yaml.safe_load((tiny / "flow.yaml").read_text())
    del config["model"]["heads"]
    config["model"]["preset"] = "small"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "run.yaml"


@pytest.fixture
def init(tiny: Path, tmp_path: Path) -> Path:
    """A config of a run from diffusers' weights."""
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1, "ffn_dim": 48, "freq_dim": 34}
    wan = FAMILIES["Wan"].build({**sizes, "in_channels": 4, "out_channels": 4, "text_dim": 16})
    randomise(wan, 0).save_pretrained(tmp_path / "base")
    tokenizer = build_word_tokenizer(["a red circle"])
    text = TextEncoder(small_umt5(len(tokenizer), 16, 1, 2), tokenizer)
    text.save(tmp_path / "text" / "text_encoder", tmp_path / "text" / "tokenizer")
    config = yaml.safe_load((tiny / "flow.yaml").read_text())
    config |= {"model": {"init": str(tmp_path / "base")}, "text": {"path": str(tmp_path / "text"), "padding": 32}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "run.yaml"


def train(config: Path, folder: Path, steps: int, *overrides: str) -> None:
    given = [f"run={folder}", f"schedule.steps={steps}", "schedule.decay=constant", "data.workers=0", *overrides]
    run(load_config(config, given), ALONE)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the state of the last checkpoint."""
    place = published(folder)[-1] / "manifest.json"
    about = json.loads(place.read_text())
    change(about["state"])
    place.write_text(json.dumps(about | {"sha256": checksum(about)}))


def shards(folder: Path) -> bytes:
    return (published(folder)[-1] / "rank-00000.safetensors").read_bytes()


def test_a_preset_that_has_other_heads_since_is_not_gone_on_with(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, now = tmp_path / "run", PRESETS["small"]
    with monkeypatch.context() as earlier:
        earlier.setitem(PRESETS, "small", replace(now, heads=6))
        train(small, folder, 1)
        train(small, tmp_path / "whole", 2)
    before = shards(folder)
    with pytest.raises(StditError) as caught:
        train(small, folder, 2)
    said = str(caught.value)
    assert "\n" not in said and "step-00000001" in said
    assert "model.heads is 3 now, the run began with 6. Add model.heads=6, or choose another run=PATH." in said
    for heads in (3, 1):
        with pytest.raises(StditError, match=rf"model\.heads: 6 → {heads}"):
            train(small, folder, 2, f"model.heads={heads}")
    assert shards(folder) == before
    train(small, folder, 2, "model.heads=6")
    assert load_transformer(folder / "model").config.heads == 6
    assert shards(folder) == shards(tmp_path / "whole")  # as if nothing had changed in between
    train(small, folder, 3, "model.heads=6")


def test_any_setting_of_a_preset_counts_and_one_that_is_new_had_its_default(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    train(small, folder, 1, "model.heads=2")
    with monkeypatch.context() as later:
        later.setitem(PRESETS, "small", replace(PRESETS["small"], eps=1e-5, rope_max=512))
        with pytest.raises(StditError) as caught:
            train(small, folder, 2, "model.heads=2")
        assert "Add model.eps=1e-06 model.rope_max=1024, or" in str(caught.value)
        rewrite(folder, lambda state: [state["networks"]["model"].pop(name) for name in ("compression", "rope_scale")])
        kept = ["model.eps=1e-06", "model.rope_max=1024"]
        train(small, folder, 2, "model.heads=2", *kept)
    rewrite(folder, lambda state: state.pop("networks"))
    capsys.readouterr()
    train(small, folder, 3, "model.heads=2", *kept)
    assert "without its network's settings: they are not checked" in capsys.readouterr().out


@pytest.mark.parametrize("before", [None, 1, 3])
def test_a_run_that_began_with_other_noise_is_not_gone_on_with(small: Path, tmp_path: Path, before: int | None) -> None:
    folder = tmp_path / "run"
    train(small, folder, 1)

    def change(state: dict[str, Any]) -> None:
        assert state.pop("randomness") == 2
        if before is not None:  # the first versions did not record it
            state["randomness"] = before

    rewrite(folder, change)
    shard = shards(folder)
    train(small, folder, 1)  # which is finished, so that nothing is drawn
    with pytest.raises(StditError, match=rf"step-00000001: .*randomness {before or 1}, here 2.* other noise") as caught:
        train(small, folder, 2)
    assert "\n" not in str(caught.value) and shards(folder) == shard


@pytest.mark.parametrize("more", [[], ["model.trainable=['blocks.0.*']"], ["model.lora={rank: 2}"]])
def test_weights_that_a_later_version_reads_otherwise_are_refused(init: Path, tmp_path: Path, more: list[str]) -> None:
    folder = tmp_path / "run"
    train(init, folder, 1, *more)
    train(init, folder, 2, "model.heads=2", *more)  # what the weights say anyway
    rewrite(folder, lambda state: state["networks"]["model"].update(rope_theta=500.0))
    with pytest.raises(StditError) as caught:
        train(init, folder, 3, "model.heads=2", *more)
    assert "model.rope_theta is 10000.0 now, the run began with 500.0. Resume with the stdit that" in str(caught.value)


def test_a_vaes_settings_are_kept_too(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, config, blocks = tmp_path / "run", tiny / "vae.yaml", VAE_PRESETS["toy"].num_res_blocks
    train(config, folder, 1)
    with monkeypatch.context() as later:
        later.setitem(VAE_PRESETS, "toy", replace(VAE_PRESETS["toy"], num_res_blocks=3))
        with pytest.raises(StditError, match=r"vae\.num_res_blocks is 3 now, .* Add vae\.num_res_blocks=\d, or"):
            train(config, folder, 2)
        train(config, folder, 2, f"vae.num_res_blocks={blocks}")
