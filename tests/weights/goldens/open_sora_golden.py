"""How open_sora_golden.npz was made: Open-Sora v1.2.0's own autoencoder, sampler and cleaning of texts.

    git clone -b v1.2.0 https://github.com/hpcaitech/Open-Sora
    pip install rotary-embedding-torch==0.5.3 beautifulsoup4==4.12.3
    PYTHONPATH=Open-Sora python tests/weights/goldens/open_sora_golden.py

Weights are not kept: `vae_weights` and golden_tools.py make them from their names and shapes, here and in the tests.
The autoencoder's draws are replaced by their means; what Open-Sora imports for many GPUs by stand-ins.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from golden_tools import Golden, described, open_sora, random_weights, released, shapes_of, weights
from safetensors.torch import save_file

FILE = Path(__file__).with_suffix(".npz")
SPATIAL = {"layers_per_block": 1, "latent_channels": 4}
TEMPORAL = {"filters": 4, "num_groups": 2, "num_res_blocks": 1}
# levels of the autoencoder of frames; the one over time; frames of a group
VAES: tuple[tuple[tuple[int, ...], dict[str, Any], int], ...] = (
    ((32, 64), {**TEMPORAL, "channel_multipliers": (1, 2, 2, 4), "temporal_downsample": (False, True, True)}, 17),
    ((32, 32, 64), {**TEMPORAL, "channel_multipliers": (1, 3), "temporal_downsample": (True,)}, 9),
    ((32,) * 4, {**TEMPORAL, "channel_multipliers": (1, 1, 2), "temporal_downsample": (True, True)}, 17),
)
CLIPS = (  # of which autoencoder; frames, height, width
    (0, (1, 8, 12)), (0, (17, 6, 4)), (0, (34, 6, 4)), (0, (22, 4, 6)), (1, (1, 8, 12)), (1, (14, 12, 8)),
    (2, (5, 24, 32)),
)  # fmt: skip
STDIT3 = {
    "hidden_size": 24, "num_heads": 2, "in_channels": 4, "caption_channels": 10, "depth": 2, "input_sq_size": 64,
    "model_max_length": 6,
}  # fmt: skip
HEIGHT, WIDTH, STEPS, GUIDANCE, FPS = 32, 48, 3, 7.0, 24.0
SAMPLED = {"an image": (1, False), "a clip": (34, False), "a clip from an image": (17, True)}  # frames, whether known
WORDS = 4  # of the text's positions
TEXTS = (
    "A Red circle, moves LEFT. aesthetic score: 6.5. motion score: 7.0. camera motion: pan right.",
    "see https://example.com/a/b and www.site.org/x now", "<b>bold</b> &amp; <i>it</i><script>x=1</script>",
    "caf\u00c3\u00a9, 100% sure", "@someone said \"hi\" ''there''", "中文 and русский 3х4, 5x7, 1.5×2",
    "file_name-with-many-parts-in_it.mp4", "at 192.168.0.1 on 5:30 ", "#123 #12345 1234567 jc6640 jc6640vc 6640vc231",
    "FREE shipping! worldwide free shipping, click for more. download free", "“quotes” ‘single’ — dash–dash",
    "a...b .. c . d", "(brackets) [x] {y} | z \\ w / v * u", "page 12, photo.jpg images", "<person> walks: slow",
    "'quoted all'", "a1b2c3d4 test", "-leading, trailing-", ".hidden", "a+b%20c", "tom &amp;amp; jerry",
    "x < y and y > z", "", "line one\nline two\\nthree", "well-known red-brick one-storey two-door house", "a :b,c",
)  # fmt: skip


def vae_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """`weights` that keep what convolutions are given about as large as it is."""
    made = weights(shapes)
    for name, tensor in made.items():
        if tensor.ndim > 3 and name not in ("scale", "shift"):
            tensor *= (tensor.shape[-1] / tensor[0].numel()) ** 0.5
        elif "norm" in name and name.endswith("weight"):
            tensor += 1
    made["scale"] = made["scale"].abs() + 1
    return made


def clip(number: int) -> torch.Tensor:
    """(1, 3, T, H, W) in [−1, 1]."""
    drawn = np.random.default_rng(number).random((1, 3, *CLIPS[number][1]), dtype=np.float32)
    return torch.from_numpy(drawn * 2 - 1)


def given(name: str) -> dict[str, torch.Tensor]:
    """Noise, a text and a known first frame (H, W, 3) uint8."""
    rng, frames = np.random.default_rng(len(name)), SAMPLED[name][0]
    noise = (1, 4, 1 if frames == 1 else frames // 17 * 5, HEIGHT // 8, WIDTH // 8)
    return {
        "noise": torch.from_numpy(rng.standard_normal(noise, dtype=np.float32)),
        "text": torch.from_numpy(rng.standard_normal((WORDS, 10), dtype=np.float32)),
        "image": torch.from_numpy(rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)),
    }


def stdit3_json() -> dict[str, Any]:
    return {"architectures": ["STDiT3"], "model_type": "STDiT3", **STDIT3}


def vae_json(number: int) -> dict[str, Any]:
    """As stdit writes it: the release's code does not read groups out of it."""
    group, groups = VAES[number][2], VAES[number][1]["num_groups"]
    return {"model_type": "VideoAutoencoderPipeline", "_stdit": {"format": 1, "group": group, "groups": groups}}


@cache
def kept() -> dict[str, np.ndarray]:
    with np.load(FILE) as file:
        return dict(file)


def vae_folder(place: Path, number: int) -> Path:
    """As OpenSora-VAE-v1.2's, of a small autoencoder."""
    place.mkdir(parents=True)
    save_file(vae_weights(shapes_of(kept()[f"vae.{number}.shapes"])), place / "model.safetensors")
    (place / "config.json").write_text(json.dumps(vae_json(number)))
    return place


GOLDEN = Golden("STDiT3", "stdit3", FILE, 1, lambda number: stdit3_json(), lambda number: [], ("rope.freqs",))


def _build(config: dict[str, Any], registry: object) -> torch.nn.Module:
    from opensora.models.vae import vae, vae_temporal

    name, arguments = config["type"], {key: value for key, value in config.items() if key != "type"}
    return getattr(vae_temporal if name.startswith("VAE_Temporal") else vae, name)(**arguments)


def _vae(number: int) -> torch.nn.Module:
    from diffusers import AutoencoderKL
    from opensora.models.vae.vae import VideoAutoencoderPipeline, VideoAutoencoderPipelineConfig

    widths, temporal, group = VAES[number]
    frames = AutoencoderKL(
        block_out_channels=widths, down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths), **SPATIAL,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        frames.save_pretrained(folder)
        config = VideoAutoencoderPipelineConfig(
            vae_2d={"type": "VideoAutoencoderKL", "from_pretrained": folder, "micro_batch_size": 4},
            vae_temporal={"type": "VAE_Temporal", **temporal}, micro_frame_size=group,
            shift=(0.0,) * 4, scale=(1.0,) * 4,
        )  # fmt: skip
        model = VideoAutoencoderPipeline(config).eval()
    model.load_state_dict(vae_weights({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}))
    return model


def _released_vae() -> torch.nn.Module:
    """VideoAutoencoderPipeline at the size of OpenSoraVAE_V1_2, with SDXL's autoencoder of frames."""
    from diffusers import AutoencoderKL
    from opensora.models.vae.vae import OpenSoraVAE_V1_2

    def sdxl(*_: object, **__: object) -> AutoencoderKL:
        return AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4,
        )  # fmt: skip

    AutoencoderKL.from_pretrained = sdxl
    return OpenSoraVAE_V1_2()


def _sampled(vae: torch.nn.Module) -> dict[str, np.ndarray]:
    from opensora.models.stdit.stdit3 import STDiT3, STDiT3Config
    from opensora.schedulers.rf import RFLOW

    model = STDiT3(STDiT3Config(**STDIT3)).eval()
    found = random_weights(model, GOLDEN, 0)
    for name, (frames, known) in SAMPLED.items():
        one = given(name)
        text = torch.zeros(1, 1, STDIT3["model_max_length"], 10)
        text[0, 0, :WORDS] = one["text"]

        class Told:
            y, mask = text, torch.arange(6)[None] < WORDS

            def encode(self, prompts: list[str]) -> dict[str, torch.Tensor]:
                return {"y": self.y, "mask": self.mask}

            def null(self, n: int) -> torch.Tensor:
                return model.y_embedder.y_embedding[None].repeat(n, 1, 1)[:, None]

        z, mask = one["noise"], None
        if known:
            picture = one["image"].permute(2, 0, 1)[None, :, None].float() / 127.5 - 1
            mask = torch.ones(1, z.shape[2])
            z, mask[0, 0] = torch.cat([vae.encode(picture), z[:, :, 1:]], dim=2), 0
        numbers = {"height": HEIGHT, "width": WIDTH, "num_frames": frames, "ar": HEIGHT / WIDTH}
        numbers["fps"] = FPS if frames > 1 else 120
        told = {key: torch.tensor([float(value)]) for key, value in numbers.items()}
        solver = RFLOW(num_sampling_steps=STEPS, cfg_scale=GUIDANCE, use_timestep_transform=True)
        found[f"sampled.{name}"] = solver.sample(
            model, Told(), z, ["a"], "cpu", additional_args=told, mask=mask, progress=False
        ).numpy()
    return found


@torch.no_grad()
def main() -> None:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as Theirs

    open_sora(_build)  # diffusers looks for what they replace
    from opensora.models.text_encoder.t5 import text_preprocessing
    from opensora.models.vae.vae_temporal import DiagonalGaussianDistribution as Own

    for kind in (Theirs, Own):
        kind.sample = kind.mode
    found: dict[str, np.ndarray] = {"texts": np.array([text_preprocessing(text) for text in TEXTS])}
    models = [_vae(number) for number in range(len(VAES))]
    for number, model in enumerate(models):
        found[f"vae.{number}.shapes"] = described(model.state_dict())
    for number, (which, shape) in enumerate(CLIPS):
        latents = models[which].encode(clip(number))
        found[f"clip.{number}.latents"] = latents.numpy()
        found[f"clip.{number}.video"] = models[which].decode(latents, num_frames=shape[0]).numpy()
        assert latents.shape[2] == models[which].get_latent_size(list(shape))[0]
    found |= _sampled(models[2])
    size = released(_released_vae, GOLDEN)
    np.savez_compressed(FILE, **found, **{f"vae.{name}": value for name, value in size.items()})


if __name__ == "__main__":
    main()
