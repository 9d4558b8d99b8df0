"""`stdit sample`: prompts and known frames to MP4 files."""

from __future__ import annotations

import json
import os
import warnings
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Annotated, Literal

from typer import BadParameter, Context, Option, echo

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
    local_gpu,
    pick_device,
    when_stopped,
    within,
)
from stdit.cli.sample.arguments import parse_lora
from stdit.cli.sample.files import ClipFiles, content_hash
from stdit.cli.sample.plan import plan_clips, request_of
from stdit.cli.sample.replay import META, Replay, replayed
from stdit.cli.sample.rows import settings_of
from stdit.data.parts import choose_part
from stdit.errors import StditError
from stdit.files import make_folder
from stdit.heartbeat import HEARTBEAT, named_bars
from stdit.shapes import LARGEST


@when_stopped("Clips that are written are kept in --out: the same command makes the others.")
def sample(
    context: Context,
    model: Annotated[Path | None, Option(help="Model folder: a run's, or one in diffusers' layout.")] = None,
    out: Annotated[Path | None, folder_option("Folder to write to.")] = None,
    prompt: Annotated[str | None, Option(help="What to show.")] = None,
    prompts: Annotated[
        Path | None, Option(help="Text, a prompt a line; or .jsonl or .csv, with any setting of a clip a row.")
    ] = None,
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
    guidance_interval: Annotated[
        str | None, Option(metavar="LOW:HIGH", help="Noise levels where guidance acts; it costs nothing elsewhere.")
    ] = None,
    guidance_rescale: Annotated[
        float, Option(callback=within(0, 1), help="How far to keep the contrast of an unguided output, 0 to 1.")
    ] = 0.0,
    zero_star: Annotated[
        int | None,
        Option(metavar="STEPS", callback=within(0, 1000), help="CFG-Zero*; a flow's first STEPS stand still."),
    ] = None,
    apg: Annotated[
        str | None, Option(metavar="PARALLEL:NORM:MOMENTUM", help="Adaptive projected guidance, such as 0:15:-0.5.")
    ] = None,
    skip_layers: Annotated[
        str | None,
        Option(metavar="N,N[:SCALE[:LOW:HIGH]]", help="Skip-layer guidance: blocks, scale (2.8), noise levels."),
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
    replay: Annotated[
        Path | None,
        Option(metavar="SIDECAR", help="A clip's .json: makes its frames again. Other options count instead of its."),
    ] = None,
    solver: Annotated[
        str | None,
        Option(help="euler, unipc, dpm++, heun, lcm, ddim, ancestral, or a class of diffusers; default: the folder's."),
    ] = None,
    shift: Annotated[
        float | None,
        Option(callback=within(0.001, 1000), help="Shift of the noise levels, in place of the model folder's."),
    ] = None,
    levels: Annotated[
        str | None,
        Option(metavar="T,T,…", help="Noise levels of the steps, as few-step weights have them; they say the steps."),
    ] = None,
    reuse: Annotated[
        float,
        Option(
            callback=within(0, 0.99), help="Skip runs of the network while its output changes by less; 0.1 is good."
        ),
    ] = 0.0,
    window: Annotated[
        int | None,
        Option(callback=within(1, LARGEST), help="Frames that the network sees at once; longer clips in windows."),
    ] = None,
    init: Annotated[
        Path | None, Option(help="Video or image to change: the clip starts from it, partly noised.")
    ] = None,
    strength: Annotated[
        float, Option(callback=within(0.001, 1), help="How far --init is noised; at 1 nothing of it is left.")
    ] = 0.8,
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
    prompt_filter: Annotated[
        list[str] | None,
        Option(metavar="FILE", help="Refuse prompts with a word of this file; or MODULE:FUNCTION. Repeatable."),
    ] = None,
    frame_filter: Annotated[
        list[str] | None,
        Option(metavar="FOLDER", help="Refuse frames by this image classifier; or MODULE:FUNCTION. Repeatable."),
    ] = None,
    part: Annotated[
        str | None,
        Option(
            metavar="I/N",
            help="Make every N-th clip, from the I-th on. Default: the rank under torchrun, the task of a Slurm array, "
            "or all.",
        ),
    ] = None,
    device: Device = None,
    memory: Memory = None,
    dtype: Annotated[str | None, Option(help="float32, bfloat16 or float16; by default as stored.")] = None,
    format: Annotated[Literal["mp4", "webm", "gif", "png"], Option(help="Of the clips; png: a folder of pictures.")] = (
        "mp4"
    ),
    as_json: Json = False,
) -> None:
    """Samples clips from text, and from known frames.

    Sizes are width×height; an illegal one is an error that names the nearest, and a duration is rounded to the nearest
    legal number of frames. Each prompt gives NAME.mp4 (H.264; see --format), NAME.png (a contact sheet) and NAME.json
    (all settings, and the command that makes this clip alone: see --replay). NAME has the prompt's number and words,
    the seed and a hash of all settings: other settings never overwrite a clip, and a clip whose files are whole is not
    made again.
    In JSONL and CSV files, rows have a prompt and any other setting of a clip by its option's name, such as duration or
    seed, which counts instead of the command's. Clips of different shapes share packs.

    Example: stdit sample --model runs/toy/model --prompt "a red circle moves left" --duration 2s --out clips
    """
    original: Replay | None = context.meta.get(META)
    if replay is not None and original is None:
        again = replayed(replay, context)
        type(again.command).invoke(again.command, again)
        return
    for value, option in ((model, "--model"), (out, "--out")):
        if value is None:
            raise BadParameter(f"give {option} FOLDER.")
    assert model is not None and out is not None
    if (prompt is None) == (prompts is None):
        raise BadParameter("give either --prompt TEXT or --prompts FILE.")
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise BadParameter(f"--dtype {dtype!r} is not known: float32, bfloat16 or float16.")
    rows = settings_of(prompts, context)
    indices = [*range(len(rows))] if index is None else [index]
    if index is not None and prompts is not None:
        if index >= len(rows):
            raise BadParameter(f"--index {index}: {prompts} has {len(rows)} prompts, numbered from 0.")
        rows = [rows[index]]
    # a lone prompt in a Slurm array is that task's own, and no part of anything
    kept = {} if prompts else {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    mine = choose_part(part, kept or os.environ)
    if not mine.is_whole:
        places = [place for place in range(len(rows)) if mine.has_place(place)]
        echo(f"part {mine}, chosen by {mine.chosen_by}: {len(places)} of {len(rows)} clips", err=True)
        rows, indices = [rows[place] for place in places], [indices[place] for place in places]
        if not rows:
            return
    loras, loras_2 = ([parse_lora(text) for text in given or []] for given in (lora, lora_2))
    import torch

    from stdit.diffusion.solvers import named_config
    from stdit.sampling import filters
    from stdit.sampling.base_weights import BaseWeights
    from stdit.sampling.pipeline import Pipeline
    from stdit.text.lengths import TextLimit
    from stdit.vae.autoencoder import CausalVAE

    prompt_filters = [filters.prompt_filter(given) for given in prompt_filter or []]
    for row in rows:
        if reason := next(filter(None, (refuse(row.prompt) for refuse in prompt_filters)), None):
            raise StditError(f"{row.where}the prompt {row.prompt[:60]!r} is refused: {reason}.")
        if row.solver is not None:
            try:  # an unknown name is an error before minutes of loading
                named_config(row.solver, {})
            except StditError as error:
                raise StditError(f"{row.where}{error}") from None
    device = pick_device(device, local_gpu())
    frame_filters = [filters.frame_filter(given, device) for given in frame_filter or []]
    HEARTBEAT.doing(f"loading {model}")
    pipeline = Pipeline.load(model, dtype=getattr(torch, dtype) if dtype else None, device=device)
    pipeline.vae.memory = memory
    with warnings.catch_warnings(record=True) as left_out:
        warnings.simplefilter("always")
        pipeline.add_loras(loras, loras_2, lora_partly)
    for warning in left_out:
        echo(warning.message, err=True)
    planned = plan_clips(pipeline, rows)
    alike = {shape: [clip for clip in planned if clip.shape == shape] for shape in {clip.shape: 0 for clip in planned}}
    for shape, clips_alike in alike.items():
        if memory is not None:  # too little is an error before minutes of sampling
            assert isinstance(pipeline.vae, CausalVAE)  # setting `memory` raised for any other VAE
            pipeline.vae.stream_slices(shape.latent(pipeline.vae.config.stride).sizes, memory)
        if not as_json:
            print(clips_alike[0].describe(pipeline, len(clips_alike)))
    base = BaseWeights.read(model)
    parts = [model, *map(Path, (base.transformer, base.vae, base.text_encoder))]  # an adapter has its base
    settings = {  # of all clips
        "model": str(model), "dtype": str(pipeline.transformer.dtype).removeprefix("torch."),
        "device": torch.device(device).type,
        "dtype_option": dtype, "memory": memory,
        "loras": [[str(file), weight] for file, weight in loras],
        "loras_2": [[str(file), weight] for file, weight in loras_2],
        "model_hash": content_hash(parts),
        "lora_hashes": [[content_hash([file]), weight] for file, weight in (*loras, *loras_2)],
        "stdit": __version__, "lora_partly": lora_partly, "format": format,
    }  # fmt: skip
    for text in dict.fromkeys(text for row in rows for text in (row.prompt, row.negative)):
        if (long := TextLimit.of_encoder(pipeline.text_encoder, pipeline.text_padding or None).long(text)) is not None:
            echo(f"{text[:40]!r}… has {long}.", err=True)
    make_folder(out)
    clips = [
        ClipFiles(
            out, plan.given.prompt, number,
            {**settings, **plan.recorded(pipeline), "known_hash": plan.content_hash},
        )
        for plan, number in zip(planned, indices)
    ]  # fmt: skip
    if original is not None:
        original.check(clips[0].settings)
    to_make = [(plan, clip) for plan, clip in zip(planned, clips) if not clip.exist()]
    missing = [clip for _, clip in to_make]
    new = {clip.index for clip in missing}
    failures: dict[int, str] = {}
    with named_bars(hidden=as_json or mine.is_quiet) as progress:
        requests = [
            request_of([plan for plan, _ in pairs], [clip.index for _, clip in pairs])
            for pairs in (list(group) for _, group in groupby(to_make, lambda pair: pair[0].key))
        ]
        made = pipeline.sample_together(requests, partial(progress, "steps")) if requests else ()
        for number, (clip, latents) in enumerate(zip(missing, made), 1):
            try:
                if isinstance(latents, StditError):
                    raise latents
                chunks = filters.checked(pipeline.decode_stream(latents), frame_filters)
                clip.write(chain.from_iterable(chunks), clip.settings["fps"])
            except StditError as error:  # this clip's: the others go on
                failures[clip.index] = f"clip {clip.index} ({clip.prompt[:60]}): {error}"
            progress("clips", number, len(missing))
    done = [clip for clip in clips if clip.index not in failures]
    if as_json:
        clips_made = [clip.as_json(made=clip.index in new) for clip in done]
        first = clips[0].settings
        shared = {name: value for name, value in first.items() if all(c.settings.get(name) == value for c in clips)}
        print(json.dumps({"clips": clips_made, "settings": shared, "failures": [*failures.values()]}, indent=2))
    else:
        for clip in done:
            print(f"{clip.video or clip.image}  {clip.prompt}" + ("" if clip.index in new else "  (was there already)"))
    if failures:
        raise StditError("\n".join(failures.values()))
