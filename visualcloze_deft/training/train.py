"""A run in one process of its group, from its settings to its adapter: under DeepSpeed, on one
process or many."""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import ExitStack, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from accelerate import PartialState
from tqdm import tqdm

from visualcloze_deft.adapters import files, injection
from visualcloze_deft.backbones import compiled, kernels
from visualcloze_deft.backbones.base import Models
from visualcloze_deft.backbones.embedding_cache import Encodings
from visualcloze_deft.backbones.kernels import shapes_in
from visualcloze_deft.backbones.precision import dtype_of
from visualcloze_deft.backbones.table import backbone_of
from visualcloze_deft.config.run_settings import Run
from visualcloze_deft.runtime.launch import device_environment
from visualcloze_deft.runtime.signals import StopRequest, handling
from visualcloze_deft.runtime.watchdog import Watchdog
from visualcloze_deft.training import (
    preparation,
    run_data,
    run_folder,
    zero3,
)
from visualcloze_deft.training.checkpoint import Checkpoint
from visualcloze_deft.training.engine import (
    deepspeed_config,
    restore_moments,
    start_engine,
)
from visualcloze_deft.training.joining import (
    begun,
    check_same_data,
    joined,
    latest,
    quiet,
    quiet_exit_if_peer_died,
)
from visualcloze_deft.training.loop import Loop
from visualcloze_deft.training.metrics_log import from_first
from visualcloze_deft.training.step import kernels_at_start


def train(
    run: Run,
    *,
    resume: bool,
    prepared: bool,
    allowed: Collection[str] = (),
    divide: bool = False,
) -> None:
    """Train as the first process's `run` says, in every process of the launched group. Files land
    in `run.output`.

    prepared: whether the launcher has checked everything, made the run folder and holds its lock.
    allowed, divide: see `preparation.prepare`.
    """
    quiet()
    os.environ.update(device_environment())  # also under another launcher than ours
    cpu = not torch.cuda.is_available()
    patience = timedelta(seconds=2 * run.timeout)  # the watchdog, which can say why, comes first
    process = PartialState(cpu=cpu, timeout=patience)
    # Its shared-memory operation is for inference; building it needs a compiler and leaves a lock
    # behind when killed, on which every later start would wait for ever (DeepSpeed 0.19).
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=process.backend, verbose=False)
    asked, rank, world = StopRequest(at_once=True), process.process_index, process.num_processes
    with ExitStack() as held:
        prepare = partial(
            preparation.prepare,
            run,
            processes=world,
            resume=resume,
            allowed=allowed,
            divide=divide,
        )
        begin = partial(joined, run, held) if prepared else partial(begun, run, held, prepare)
        run = from_first(begin, rank=rank, world=world)
        held.enter_context(handling(asked.hear))
        held.enter_context(quiet_exit_if_peer_died(asked))
        process.wait_for_everyone()
        watchdog = Watchdog(Path(run.output), rank=rank, world=world, patience=run.timeout)
        with watchdog:
            train_here(run, process, resume=resume, asked=asked, watchdog=watchdog)
    process.wait_for_everyone()
    process.destroy_process_group()


def train_here(
    run: Run, process: PartialState, *, resume: bool, asked: StopRequest, watchdog: Watchdog
) -> None:
    """This process's part of the run, in a folder that is ready."""
    output = Path(run.output)
    mixture = run_data.mixture_of(run, cache=output / run_folder.INDEX)
    check_same_data(mixture, process)
    dtype = dtype_of(run.precision, process.device.type)
    start = latest(output, process) if resume else None
    watchdog.doing("choosing kernels")
    tokens = mixture.least_tokens, mixture.most_tokens
    shapes = shapes_in(run, image_tokens=tokens, device=process.device)
    rank, world = process.process_index, process.num_processes
    before = start.progress if start else None
    chosen = kernels_at_start(run, shapes, before, rank=rank, world=world)
    if process.device.type == "cuda":  # the memory of its test is not the run's
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    watchdog.doing("loading the model")
    models = load_base(run, process, dtype)
    watchdog.doing("attaching the adapter")
    attach(models.denoiser, run, start)
    kernels.use(models.denoiser, chosen)
    watchdog.doing("starting DeepSpeed")
    engine = start_engine(models.denoiser, run, process=models.process)
    if start is not None:
        restore_moments(engine, start)
    loop = Loop(
        run=run,
        mixture=mixture,
        models=models,
        engine=engine,
        rank=rank,
        world=world,
        start=before,
        chosen=chosen,
        shapes=shapes,
        asked=asked,
        watchdog=watchdog,
    )
    with compiled.explained() if run.compile else nullcontext():
        loop.run_steps()
        loop.finish()
    if models.encodings is not None:
        used = models.encodings.used_by_all()
        if process.is_main_process:
            tqdm.write(f"encodings {models.encodings.folder}: {used}")


def load_base(run: Run, process: PartialState, dtype: torch.dtype) -> Models:
    """The frozen model; under ZeRO-3 this process's share of its denoiser."""
    kept = run_folder.encodings_folder(run)
    networks = backbone_of(run.model).networks()
    return networks.load(
        run.model,
        dtype=dtype,
        device=str(process.device),
        lora=run.model_lora,
        bits=run.quantise,
        clip_text=run.clip_text,
        rest="cpu" if run.offload_encoders else None,
        encodings=Encodings(kept) if kept else None,
        split=zero3.splitter(deepspeed_config(run), dtype) if run.zero == 3 else None,
    )


def attach(denoiser: Any, run: Run, start: Checkpoint | None) -> None:
    """Add the adapter that is trained: of a checkpoint, of another run, or a new one."""
    if start is not None:
        files.load(denoiser, start.folder, trainable=True)
    elif run.adapter.init_from is not None:
        folder = Path(run.adapter.init_from)
        files.load(denoiser, folder, trainable=True, dropout=run.adapter.dropout)
    else:
        injection.attach(denoiser, run.adapter, seed=run.seed, whole=zero3.whole)
