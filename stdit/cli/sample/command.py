"""`stdit sample`: prompts and known frames to MP4 files."""

from __future__ import annotations

import json
import warnings
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import BadParameter, Option, echo

from stdit import __version__
from stdit.cli.common.options import (
    FPS,
    GUIDANCE,
    SEED,
    STEPS,
    Device,
    Json,
    Memory,
    folder_option,
    pick_device,
    when_stopped,
    within,
)
from stdit.cli.sample.arguments import parse_lora, parse_ratio, parse_seconds, parse_size, read_prompts
from stdit.cli.sample.files import ClipFiles, check_text, content_hash, frames_hash
from stdit.errors import StditError
from stdit.files import make_folder
from stdit.heartbeat import HEARTBEAT, named_bars
from stdit.shapes import LARGEST, frames_for, nearest_frames, size_for

if TYPE_CHECKING:
    import numpy as np

    from stdit.sampling.pipeline import Pipeline
    from stdit.shapes import VideoShape


@when_stopped("Clips that are written are kept in --out: the same command makes the others.")
def sample(
    model: Annotated[Path, Option(help="Model folder: a run's, or one in diffusers' layout.")],
    out: Annotated[Path, folder_option("Folder to write to.")],
    prompt: Annotated[str | None, Option(help="What to show.")] = None,
    prompts: Annotated[Path | None, Option(help="A text file with one prompt per line.")] = None,
    negative: Annotated[str, Option(help="What guidance moves away from.")] = "",
    size: Annotated[str | None, Option(help="WIDTHxHEIGHT.")] = None,
    aspect: Annotated[str | None, Option(help="WIDTH:HEIGHT, such as 16:9, with --resolution.")] = None,
    resolution: Annotated[int | None, Option(callback=within(1, LARGEST), help="Short side in pixels.")] = None,
    duration: Annotated[str | None, Option(help="Seconds, such as 3s, rounded to legal frames.")] = None,
    frames: Annotated[int | None, Option(callback=within(1, LARGEST), help="Frames; 1 makes an image.")] = None,
    fps: Annotated[float | None, Option(callback=FPS, help="Frames per second; by default the model's.")] = None,
    steps: Annotated[int, Option(callback=STEPS, help="Steps of the solver.")] = 30,
    guidance: Annotated[float, Option(callback=GUIDANCE, help="Classifier-free guidance; 1 or less is none.")] = 5.0,
    guidance_2: Annotated[
        float | None, Option(callback=GUIDANCE, help="The same for the low-noise expert, if there are two.")
    ] = None,
    seed: Annotated[int, Option(callback=SEED, help="Decides the noise, together with the clip's index.")] = 0,
    index: Annotated[
        int | None,
        Option(
            callback=within(0, 999_999),
            help="With --prompts: make only this clip, numbered from 0. With --prompt: use the noise that the clip of "
            "this number has.",
        ),
    ] = None,
    solver: Annotated[
        str | None,
        Option(help="euler or unipc (flows), dpm++, ddim or ancestral (DDPMs); default: the model folder's."),
    ] = None,
    shift: Annotated[
        float | None,
        Option(callback=within(0.001, 1000), help="Shift of the noise levels, in place of the model folder's."),
    ] = None,
    image: Annotated[Path | None, Option(help="Image file: the first frame.")] = None,
    last: Annotated[Path | None, Option(help="Image file: the last frame, for weights that take one.")] = None,
    video: Annotated[Path | None, Option(help="Video file to extend: the clip begins with its end.")] = None,
    video_frames: Annotated[
        int | None, Option(callback=within(1, LARGEST), help="How many of its last frames to take.")
    ] = None,
    lora: Annotated[
        list[str] | None, Option(metavar="FILE[:WEIGHT]", help="A LoRA file and its weight, by default 1; repeatable.")
    ] = None,
    lora_2: Annotated[
        list[str] | None,
        Option("--lora-2", metavar="FILE[:WEIGHT]", help="The same for the low-noise expert, if there are two."),
    ] = None,
    lora_partly: Annotated[
        bool, Option("--lora-partly", help="Ignore LoRA tensors for layers that the model lacks.")
    ] = False,
    device: Device = None,
    memory: Memory = None,
    dtype: Annotated[str | None, Option(help="float32, bfloat16 or float16; by default as stored.")] = None,
    as_json: Json = False,
) -> None:
    """Samples clips from text, and from known frames.

    Sizes are width×height; an illegal one is an error that names the nearest, and a duration is rounded to the nearest
    legal number of frames. Each prompt gives NAME.mp4 (H.264), NAME.png (a contact sheet) and NAME.json (all settings,
    and the command that makes this clip alone). NAME has the prompt's number and words, the seed and a hash of all
    settings: other settings never overwrite a clip, and an existing clip is not made again.

    Example: stdit sample --model runs/toy/model --prompt "a red circle moves left" --duration 2s --out clips
    """
    source = image or video
    for wrong, message in (
        ((prompt is None) == (prompts is None), "give either --prompt TEXT or --prompts FILE."),
        (image and video, "--image and --video both say how the clip begins: give one."),
        (last and not source, "--last goes with --image or --video: how the clip begins."),
        (video_frames and not video, "--video-frames says how much of --video to take: give --video."),
        (size and (aspect or resolution), "--size already says the size: leave out --aspect and --resolution."),
        (frames and duration, "--frames and --duration say the same thing: give one."),
    ):
        if wrong:
            raise BadParameter(message)
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise BadParameter(f"--dtype {dtype!r} is not known: float32, bfloat16 or float16.")
    exact_size = parse_size(size) if size else None
    ratio = parse_ratio(aspect) if aspect else None
    seconds = parse_seconds(duration) if duration else None
    texts = read_prompts(prompts) if prompts is not None else [prompt or ""]
    for text in texts:
        check_text(text, "--prompt" if prompts is None else str(prompts))
    check_text(negative, "--negative")
    indices = range(len(texts)) if index is None else range(index, index + 1)
    if index is not None and prompts is not None:
        if index >= len(texts):
            raise BadParameter(f"--index {index}: {prompts} has {len(texts)} prompts, numbered from 0.")
        texts = [texts[index]]
    loras, loras_2 = ([parse_lora(text) for text in given or []] for given in (lora, lora_2))
    for file in (source, last):
        if file is not None and not file.is_file():
            raise StditError(f"{file} is not a file.")
    import torch

    from stdit.data.decode.video import probe, read_frames
    from stdit.diffusion.solvers import named_config
    from stdit.sampling.base_weights import BaseWeights
    from stdit.sampling.pipeline import Pipeline, SampleRequest
    from stdit.text.lengths import TextLimit
    from stdit.vae.autoencoder import CausalVAE

    if solver is not None:
        named_config(solver, {})  # an unknown name is an error before minutes of loading
    device = pick_device(device)
    HEARTBEAT.doing(f"loading {model}")
    pipeline = Pipeline.load(model, dtype=getattr(torch, dtype) if dtype else None, device=device)
    pipeline.vae.memory = memory
    with warnings.catch_warnings(record=True) as left_out:
        warnings.simplefilter("always")
        pipeline.add_loras(loras, loras_2, lora_partly)
    for warning in left_out:
        echo(warning.message, err=True)
    fps = float(pipeline.settings.fps if fps is None else fps)
    if ratio is None and exact_size is None and source is not None:
        probed = probe(str(source))
        ratio = probed.width / probed.height
    if seconds is not None:
        frames = frames_for(seconds, fps, pipeline.vae.config.stride)
    shape = pipeline.shape(exact_size or _nearest_size(pipeline, ratio, resolution), frames)
    if memory is not None:  # too little is an error before minutes of sampling
        assert isinstance(pipeline.vae, CausalVAE)  # setting `memory` raised for any other VAE
        pipeline.vae.stream_slices(shape.latent(pipeline.vae.config.stride).sizes, memory)
    known = _known(pipeline, shape, fps, image, video, video_frames)
    if known is not None and last is not None:
        known["last"] = read_frames(str(last), 1, (shape.width, shape.height))[0]
    known_count = 0 if known is None else 1 if "image" in known else len(known["video"])
    if not as_json:
        print(_chosen(shape, fps, fps if pipeline.knows_fps else pipeline.settings.fps, len(texts), known_count))
    options: dict[str, Any] = {  # of the request, and recorded with each clip
        "frames": shape.frames, "fps": fps, "steps": steps, "guidance": guidance, "guidance_2": guidance_2,
        "seed": seed, "shift": shift,
    }  # fmt: skip
    base = BaseWeights.read(model)
    parts = [model, *map(Path, (base.transformer, base.vae, base.text_encoder))]  # an adapter has its base
    settings = {
        "model": str(model), "negative": negative, "size": f"{shape.width}x{shape.height}", **options,
        "solver": solver or pipeline.scheduler, "image": str(image) if image else None,
        "last": str(last) if last else None, "video": str(video) if video else None,
        "known_frames": known_count, "dtype": str(pipeline.transformer.dtype).removeprefix("torch."), "device": device,
        "dtype_option": dtype, "memory": memory,
        "loras": [[str(file), weight] for file, weight in loras],
        "loras_2": [[str(file), weight] for file, weight in loras_2],
        "model_hash": content_hash(parts),
        "lora_hashes": [[content_hash([file]), weight] for file, weight in (*loras, *loras_2)],
        "known_hash": frames_hash(known), "stdit": __version__,
        "lora_partly": lora_partly,
    }  # fmt: skip
    for text in dict.fromkeys([*texts, negative]):
        if (long := TextLimit.of_encoder(pipeline.text_encoder, pipeline.text_padding or None).long(text)) is not None:
            echo(f"{text[:40]!r}… has {long}.", err=True)
    make_folder(out)
    clips = [ClipFiles(out, text, number, settings) for text, number in zip(texts, indices)]
    missing = [clip for clip in clips if not clip.exist()]
    new = {clip.index for clip in missing}
    failures: dict[int, str] = {}
    with named_bars(hidden=as_json) as progress:
        request = SampleRequest(
            [clip.prompt for clip in missing], indices=[clip.index for clip in missing], negative_prompt=negative,
            size=(shape.width, shape.height), known=known, solver=solver, **options,
        ) if missing else None  # fmt: skip
        made = pipeline.sample_clips(request, partial(progress, "steps")) if request else ()
        for number, (clip, latents) in enumerate(zip(missing, made), 1):
            try:
                if isinstance(latents, StditError):
                    raise latents
                clip.write(chain.from_iterable(pipeline.decode_stream(latents)), fps)
            except StditError as error:  # this clip's: the others go on
                failures[clip.index] = f"clip {clip.index} ({clip.prompt[:60]}): {error}"
            progress("clips", number, len(missing))
    done = [clip for clip in clips if clip.index not in failures]
    if as_json:
        clips_made = [clip.as_json(made=clip.index in new) for clip in done]
        print(json.dumps({"clips": clips_made, "settings": settings, "failures": [*failures.values()]}, indent=2))
    else:
        for clip in done:
            print(f"{clip.video or clip.image}  {clip.prompt}" + ("" if clip.index in new else "  (was there already)"))
    if failures:
        raise StditError("\n".join(failures.values()))


def _nearest_size(pipeline: Pipeline, ratio: float | None, resolution: int | None) -> tuple[int, int] | None:
    """The legal size nearest to an aspect ratio and a short side. The model's own fills in the one that is None."""
    if ratio is None and resolution is None:
        return None
    default = pipeline.settings.shape
    short = min(default.width, default.height) if resolution is None else resolution
    return size_for(ratio or default.width / default.height, short, pipeline.multiple)


def _known(
    pipeline: Pipeline, shape: VideoShape, fps: float, image: Path | None, video: Path | None, count: int | None
) -> dict[str, np.ndarray] | None:
    """The known frames, scaled to cover the clip and cropped at the centre."""
    from stdit.data.decode.video import probe, read_frames

    size = (shape.width, shape.height)
    if image is not None:
        return {"image": read_frames(str(image), 1, size)[0]}
    if video is None:
        return None
    found = probe(str(video))
    there = max(1, int(found.duration * fps + 1e-6))  # frames at this rate
    if count is None:  # about half of the clip, if the video is that long
        count = nearest_frames(min(there, 1 + (shape.frames - 1) // 2), pipeline.vae.config.stride)[0]
    elif count > there:
        raise StditError(f"{video} has {there} frames at {fps:g} fps, not the {count} of --video-frames.")
    start = max(found.start, found.end - 1 / found.fps - (count - 1) / fps)  # the last one is the video's last
    return {"video": read_frames(str(video), count, size, fps, start)}


def _chosen(shape: VideoShape, fps: float, trained: float, clips: int, known: int) -> str:
    """Describes the clips to sample in one line."""
    many = f"{clips} clips, " if clips > 1 else ""
    if shape.frames == 1:
        return f"{many}{shape.width}x{shape.height}, an image"
    line = f"{many}{shape.width}x{shape.height}, {shape.frames} frames at {fps:g} fps, {shape.frames / fps:.2f} s"
    if known:
        line += f", the first {known} known" if known > 1 else ", the first frame known"
    if fps != trained:
        line += f" (trained at {trained:g} fps: motion plays {fps / trained:.2g} times as fast)"
    return line
