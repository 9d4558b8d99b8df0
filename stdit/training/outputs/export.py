"""What comes of a run's averaged weights: modules and pipelines that hold them, and its model folder, run/model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from stdit.diffusion.solvers import with_static_shift, write_scheduler
from stdit.errors import StditError
from stdit.files import check_copyable, copy_folder, publish_folder, publish_text, remove_folder, within, writing
from stdit.models.transformer import Experts
from stdit.sampling.base_weights import BaseWeights
from stdit.sampling.model_folder import FolderSettings
from stdit.sampling.pipeline import Pipeline
from stdit.training.config import RunConfig
from stdit.training.engine.engine import Engine
from stdit.training.engine.parallel import Ask, World
from stdit.training.objectives.two_experts import TransformerObjective
from stdit.training.objectives.vae import VaeModule
from stdit.training.outputs.spread import share_clips
from stdit.training.setup.build import RunComponents
from stdit.training.setup.frozen import check_unchanged
from stdit.training.setup.lora import export_adapters, merge_lora
from stdit.vae.autoencoder import CausalVAE, latent_sums, mean_and_deviation
from stdit.vae.training.trainable_parts import join_split_kernels
from stdit.weights.io import NumbersOf, own, save_transformer, save_vae
from stdit.weights.sources import expert_folders
from stdit.weights.tensor_files import read_json

FORMAT = 1  # of export.json
VAE_CLIPS = 256  # to measure the latents' mean and deviation on, at most
Weights = Iterable[tuple[str, Tensor]]  # all parameters that train by name, whole and in fp32, one at a time


class AveragedWeights:
    """The averaged weights (without an average: the masters) in host memory, on every rank, one parameter at a time:
    beside its own state, a rank holds one."""

    def __init__(self, engine: Engine, world: World) -> None:
        self.engine, self.world = engine, world
        flats = engine.ema.averages if engine.ema else engine.flat_masters
        self._places = {piece.name: (flat, piece) for flat, pieces in zip(flats, engine.pieces) for piece in pieces}

    def whole(self, name: str) -> Tensor:
        """A parameter in fp32. All ranks ask for the same one together."""
        found = torch.zeros(self.engine.shapes[name])
        if name in self._places:
            flat, piece = self._places[name]
            mine = flat.detach().reshape(-1)[piece.start : piece.start + piece.numel]
            found.view(-1)[piece.offset : piece.offset + piece.numel] = mine.to("cpu", torch.float32)
        return found if self.engine.replicated else self.world.join_(found)


def averaged_weights(engine: Engine, world: World) -> Iterator[tuple[str, Tensor]]:
    """All of `AveragedWeights` by name. All ranks iterate together."""
    weights = AveragedWeights(engine, world)
    for name in engine.shapes:
        yield name, weights.whole(name)


def trained_module(components: RunComponents, weights: Weights, world: World, wanted: bool = True) -> nn.Module | None:
    """The objective's module with these weights, on this rank's device: a transformer's in the run's precision, a VAE
    in fp32. Adapters and split kernels are merged.

    wanted: whether this rank wants it. The others take part in the exchange of weights, and get None.
    """
    if not wanted:
        for _ in weights:
            pass
        return None
    objective = components.objective
    module = objective.fresh(drawn=False)
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, weight in weights:
            parameters.pop(name).copy_(weight)
        assert not parameters, parameters.keys()
        merge_lora(module)
        join_split_kernels(module)
    return module.to(world.device, objective.dtype if isinstance(objective, TransformerObjective) else None)


def make_pipeline(components: RunComponents, module: nn.Module) -> Pipeline:
    """A pipeline of what `trained_module` gave."""
    objective = components.objective
    assert isinstance(objective, TransformerObjective)
    transformer, text_encoder = objective.networks(module)
    scheduler = with_static_shift(objective.scheduler, components.config.objective.flow.noise_levels.shift)
    return Pipeline(transformer, objective.vae, text_encoder, scheduler, folder_settings(components))


def folder_settings(components: RunComponents) -> FolderSettings:
    """How the exported model folder is sampled by default."""
    config, shapes = components.config, tuple(map(str, components.sampled_shapes))
    return FolderSettings(config.data.fps, shapes, config.text.padding, config.objective.flow.noise_levels.shift_tokens)


def export(components: RunComponents, engine: Engine, world: World, step: int, module: nn.Module | None) -> None:
    """Publishes run/model. All ranks call it together; rank 0 writes. Where all of a transformer trains, its weights go
    to the disk parameter by parameter, and no rank holds all of them.

    module: of `trained_module` for these weights, if all ranks have made it already.
    """
    config, objective = components.config, components.objective
    is_vae, weights = config.objective.kind == "vae", AveragedWeights(engine, world)
    lora = None if is_vae else config.model.lora
    adapters = {} if lora is None else dict(averaged_weights(engine, world))
    streamed = module is None and isinstance(objective, TransformerObjective) and all_trains(objective)
    if module is None and not streamed and (lora is None or lora.merged):
        wanted = is_vae or world.is_main
        module = trained_module(components, averaged_weights(engine, world), world, wanted)
    if is_vae:
        assert isinstance(module, VaeModule)
        vae = measured(module.vae, components, world)

    def write(ask: Ask, folder: Path) -> None:
        if is_vae:
            write_vae(components, vae, folder)
        elif streamed:
            assert isinstance(objective, TransformerObjective)
            outline = objective.fresh(drawn=False).to(objective.dtype)
            write_model(components, outline, adapters, folder, asked_for(outline, objective, ask))
        else:
            write_model(components, module, adapters, folder)

    run = Path(config.run.path)
    world.after_main(lambda ask: publish_model(run, step, partial(write, ask)), weights.whole)


def all_trains(objective: TransformerObjective) -> bool:
    """Whether no weights of the transformers are frozen: `fresh` then needs no numbers."""
    return all(flow.remake is None for flow in objective.flows)


@torch.no_grad()
def asked_for(module: nn.Module, objective: TransformerObjective, ask: Ask) -> NumbersOf:
    """What is written in place of the parameters of the module's transformers, which hold no numbers. A text encoder
    that trains is small and gets its own now."""
    names: dict[Tensor, str] = {p: name for name, p in module.named_parameters() if p.requires_grad}
    transformer: set[Tensor] = set(objective.networks(module)[0].parameters())
    for parameter in names.keys() - transformer:
        parameter.copy_(ask(names[parameter]))
    return lambda tensor: ask(names[tensor]).to(tensor.dtype) if tensor in transformer else tensor


def measured(vae: CausalVAE, components: RunComponents, world: World) -> CausalVAE:
    """The VAE with its latents' mean and deviation measured anew, if its encoder trained."""
    if components.config.objective.vae.train != "decoder":
        sums = share_clips(
            components, None, VAE_CLIPS, world,
            lambda clip: latent_sums(vae, clip.example.video[None].to(world.device)),
        )  # fmt: skip
        mean, std = mean_and_deviation(sums)
        vae.config = replace(vae.config, latents_mean=mean, latents_std=std)
    return vae


def write_vae(components: RunComponents, vae: CausalVAE, folder: Path) -> None:
    save_vae(vae, folder / "vae")
    FolderSettings(components.config.data.fps, tuple(map(str, components.shapes)), None).write(folder)


def write_model(
    components: RunComponents,
    module: nn.Module | None,
    adapters: Mapping[str, Tensor],
    folder: Path,
    numbers: NumbersOf = own,
) -> None:
    """Writes a model folder: a copy of model.init's with the trained transformers, if all else comes from there too.

    A run with adapters writes their files and where the base model is, or if asked the base model with them merged.

    module: of `trained_module`; None if adapters are written alone.
    adapters: the weights that trained, if they are adapters.
    numbers: of the transformers; see `save_transformer`.
    """
    config, objective = components.config, components.objective
    assert isinstance(objective, TransformerObjective)
    if (lora := config.model.lora) is not None:
        export_adapters(adapters, folder, objective.model_config, lora, config.model.expert)
        if not lora.merged:
            return write_base(components, folder)
    assert module is not None
    init = _copied_from(config)
    if init is None:
        return make_pipeline(components, module).save(folder, numbers)
    network, _ = objective.networks(module)
    names = _trained_names(config)
    for path in _copied(init, names):
        copy_folder(path, folder / path.name)
    save_transformer(network, folder if isinstance(network, Experts) else folder / names[0], numbers=numbers)
    index = read_json(init / "model_index.json")
    if config.model.inflate:
        index[names[0]] = ["stdit", "STDiT"]  # so that no other program takes it for an image model
    publish_text(folder / "model_index.json", json.dumps(index, indent=2) + "\n")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        described = read_json(scheduler)
        if (moved := with_static_shift(described, config.objective.flow.noise_levels.shift)) != described:
            write_scheduler(moved, scheduler.parent)
    folder_settings(components).write(folder)


def write_base(components: RunComponents, folder: Path) -> None:
    """Makes a model folder of an adapter alone: where its base model is, and how to sample it.

    Raises StditError if the base model's files have changed since the run began.
    """
    config, objective = components.config, components.objective
    assert isinstance(objective, TransformerObjective)
    check_unchanged(config, components.frozen)
    given = (config.model.init, config.vae.path, config.text.path)
    transformer, vae, text_encoder = (str(Path(path or "").expanduser().resolve()) for path in given)
    pipeline = objective.scheduler.get("_pipeline", "WanPipeline")
    base = BaseWeights(transformer, vae, text_encoder, pipeline)
    replace(base, content=base.contents()).write(folder)
    scheduler = with_static_shift(objective.scheduler, config.objective.flow.noise_levels.shift)
    write_scheduler(scheduler, folder / "scheduler")
    folder_settings(components).write(folder)


def _copied_from(config: RunConfig) -> Path | None:
    """The model folder to copy the other parts from: model.init's, if the VAE and the text encoder are its own."""
    init = Path(config.model.init or "").expanduser()
    whole = config.model.init and (init / "model_index.json").is_file()
    return init if whole and {config.vae.path, config.text.path} == {str(init)} else None


def _trained_names(config: RunConfig) -> list[str]:
    """The names of the exported transformers' folders."""
    names = list(expert_folders("diffusers").values())
    return names if config.model.expert == "both" else [names[config.model.expert == "low"]]


def _copied(init: Path, trained: list[str]) -> list[Path]:
    """The folders of a model folder that an export copies."""
    index = read_json(init / "model_index.json")
    listed = [part for part, value in index.items() if isinstance(value, list) and any(value)]
    parts = listed or ("vae", "text_encoder", "tokenizer", "scheduler")  # a gathered folder's index lists none
    return [place for part in parts if part not in trained and ((place := init / part).is_dir() or place.is_symlink())]


def check_export(config: RunConfig) -> None:
    """Raises StditError before training if the export would fail at a file that cannot be copied (a dangling link), or
    replace a run/model that the run reads or that no run wrote."""
    final = Path(config.run.path) / "model"
    inputs = {"model.init": config.model.init, "vae.path": config.vae.path, "text.path": config.text.path}
    for name, given in inputs.items():
        if given and within(Path(given).expanduser(), final):
            raise StditError(f"{name} is {given}, in {final}, which the run would replace. Choose another run=PATH.")
    is_empty = final.is_dir() and not any(final.iterdir())
    if os.path.lexists(final) and not (final / "export.json").is_file() and not is_empty:
        raise StditError(f"{final}: is there already, and no training wrote it. Rename it, or choose another run=PATH.")
    adapter_alone = config.model.lora is not None and not config.model.lora.merged
    init = _copied_from(config)
    if config.objective.kind == "flow" and init is not None and not adapter_alone:
        for path in _copied(init, _trained_names(config)):
            check_copyable(path)


def publish_model(run: Path, step: int, write: Callable[[Path], None]) -> None:
    """Makes run/model of what `write` puts into a folder, whole or not at all, and records the step."""
    final, temporary = run / "model", run / ".tmp-model"
    remove_folder(temporary)
    try:
        with writing(temporary):
            write(temporary)
            (temporary / "export.json").write_text(json.dumps({"format": FORMAT, "step": step}) + "\n")
            publish_folder(temporary, final)
    finally:  # frees a full disk
        with suppress(OSError):
            remove_folder(temporary)


def exported_step(run: Path) -> int | None:
    """The step whose weights are in run/model; None if there is no whole export."""
    try:
        return int(json.loads((run / "model" / "export.json").read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
