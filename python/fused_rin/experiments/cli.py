"""The command line `fused-rin`. A mistake in what was asked for ends in one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from .. import __version__
from .data import data_folder, download
from .errors import CLOSED, INTERRUPTED, UserError, drop_output
from .models import MODELS
from .training.defaults import RECIPES, TASK_DEFAULTS
from .training.runs import Run
from .training.settings import TASKS, Settings

EXPERIMENTS = ("identity-prior", "precision")
OPTIONS = {field.name: field for field in dataclasses.fields(Settings)}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    try:
        try:
            _main(arguments)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # at the interpreter's end nobody could answer for what it raises
    except BrokenPipeError:  # `| head`: nobody reads on
        drop_output()
        sys.exit(CLOSED)
    except OSError as error:  # `> FILE` on a full disk; those of our own files are UserErrors
        drop_output()
        Parser(prog="fused-rin").error(f"the output cannot be written: {error.strerror or error}")


def _main(arguments: Sequence[str] | None) -> NoReturn:
    parser = Parser(prog="fused-rin", description="Train Recurrent Identity Networks and their peers.")
    parser.add_argument("--version", action="version", version=f"fused-rin {__version__}, torch {torch.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_demo(commands)
    _add_reproduce(commands)
    _add_experiment(commands)
    _add_diagnose(commands)
    _add_download(commands)
    _add_bench(commands)
    options = parser.parse_args(arguments)
    try:
        status = options.run(options)
        _leave_group()
        sys.exit(status)
    except UserError as error:
        parser.error(" ".join(str(error).split()))
    except ModuleNotFoundError as error:
        if (error.name or "fused_rin").startswith("fused_rin"):
            raise
        parser.error(f"{error.name} is not installed; the commands need: pip install 'fused-rin[experiments]'")
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _leave_group() -> None:
    """Ends the process group that torchrun's processes share, if there is one.

    A thread of gloo that drops a tensor while the interpreter ends aborts the process ("terminate called without an
    active exception": 2 of 25 pairs). The threads end with the group, and the group with the last model that holds
    it. After an error it is not called: the other processes may wait in a collective.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        gc.collect()
        distributed.destroy_process_group()


def _add_train(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train a model on a task",
        description="Train a model on a task. Ctrl-C leaves a checkpoint; go on with --resume.",
        epilog="Defaults of single tasks: "
        + "; ".join(
            f"{task}: " + ", ".join(f"{name.replace('_', '-')} {value}" for name, value in settings.items())
            for task, settings in TASK_DEFAULTS.items()
            if settings
        ),
    )
    parser.set_defaults(run=_train)
    parser.add_argument("--task", help=", ".join(TASKS))
    parser.add_argument("--model", default=argparse.SUPPRESS, help=f"{', '.join(MODELS)} (default: rin)")
    parser.add_argument(
        "--recipe",
        default="",
        metavar="NAME",
        help=f"settings that go further than a task's defaults: {', '.join(RECIPES)}",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: runs/TASK-MODEL-SEED)")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="go on with the run in this folder")
    for name, field in OPTIONS.items():
        if name in ("task", "model"):
            continue
        option: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _about(name)}
        if isinstance(field.default, bool):
            option["action"] = argparse.BooleanOptionalAction if field.default else "store_true"
        else:
            option["type"] = type(field.default)
            option["metavar"] = {int: "N", float: "X"}.get(type(field.default), "NAME")
            if field.default != "":
                option["help"] += f" (default: {field.default})" if option["help"] else f"default: {field.default}"
        parser.add_argument(_flag(name), **option)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _about(name: str) -> str:
    """What `--help` says of a setting."""
    about = OPTIONS[name].metadata
    text = about["text"] or ", ".join(about["choices"])
    return f"{', '.join(about['tasks'])}: {text}" if about["tasks"] else text


def _train(options: argparse.Namespace) -> int:
    given = {name: value for name, value in vars(options).items() if name in OPTIONS and value is not None}
    if options.resume is None:
        if "task" not in given:
            raise UserError(f"--task is required (or --resume); known: {', '.join(TASKS)}")
        settings = Settings.for_task(recipe=options.recipe, **given)
        for name in given.keys() - {"task"}:
            if (tasks := OPTIONS[name].metadata["tasks"]) and settings.task not in tasks:
                raise UserError(f"{_flag(name)} is for the task {', '.join(tasks)}, got {settings.task!r}")
        folder = Run.new(options.out or Path("runs") / _default_name(settings), settings)
    else:
        for name in ("out", "recipe"):
            if getattr(options, name):
                raise UserError(f"--{name} and --resume cannot be given together")
        folder = _reopen(options.resume, given)

    from .training.progress import train_command  # Fabric and matplotlib take two seconds to import

    return train_command(folder, resume=options.resume is not None)


def _default_name(settings: Settings) -> str:
    return f"{settings.task}-{settings.model}-{settings.seed}"


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="train and time on two small tasks, in under three minutes",
        description="Train RIN, a tanh RNN and an LSTM on two small tasks, and time RIN against torch.nn.RNN.",
    )
    parser.set_defaults(run=_demo)
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="default: demo")


def _demo(options: argparse.Namespace) -> int:
    from .demo import demo

    return demo(options.out)


def _add_reproduce(commands: Any) -> None:
    parser = commands.add_parser(
        "reproduce",
        help="rerun the paper's experiments",
        description="Rerun an experiment of arXiv 1801.06105 with its settings; the same command goes on with it.",
    )
    parser.set_defaults(run=_reproduce)
    parser.add_argument("experiment", choices=("adding", "mnist", "babi", "babi-stable"))
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/reproduce-EXPERIMENT")
    parser.add_argument("--budget", type=float, default=1.0, metavar="X", help="share of the paper's epochs")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="runs of every trial (default: 1)")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="trials to run, e.g. 'sequential-1-100-*'")
    for name in ("device", "precision", "data_dir"):
        parser.add_argument(_flag(name), default=argparse.SUPPRESS, metavar="NAME", help=_about(name))
    parser.add_argument("--threads", type=int, default=argparse.SUPPRESS, metavar="N", help=_about("threads"))


def _reproduce(options: argparse.Namespace) -> int:
    from .paper.reproduce import reproduce

    names = ("device", "precision", "data_dir", "threads")
    overrides = {name: getattr(options, name) for name in names if hasattr(options, name)}
    out = options.out or Path("runs") / f"reproduce-{options.experiment}"
    return reproduce(
        options.experiment, out, budget=options.budget, seeds=options.seeds, only=options.only, overrides=overrides
    )


def _add_experiment(commands: Any) -> None:
    parser = commands.add_parser(
        "experiment",
        help="what the paper does not show: does decay towards the identity help? must U be kept, not U + I?",
        description="identity-prior: decay of U, decay of V, no decay, small rate, over sizes of the training set, "
        "strengths and optimizers. precision: U or U + I rounded after training to bfloat16, float16, float8 and int8, "
        "and trained in bfloat16. On the CPU; the same command goes on with it.",
    )
    parser.set_defaults(run=_experiment)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/EXPERIMENT")
    parser.add_argument("--budget", type=float, default=1.0, metavar="X", help="share of the planned updates")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of every trial (default: 3)")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="trials to run, e.g. 'digits-adam-*'")
    parser.add_argument("--data-dir", default="", metavar="DIR", help=_about("data_dir"))
    parser.add_argument("--threads", type=int, default=0, metavar="N", help=_about("threads"))
    parser.add_argument("--draw", type=Path, metavar="FILE", help="run nothing: table and pictures of a results.json")


def _experiment(options: argparse.Namespace) -> int:
    from .trial_folder import redraw, run_experiment

    experiment: Any  # of trials of its own
    if options.experiment == "precision":
        from .precision.experiment import Precision

        experiment = Precision()
    else:
        from .identity.experiment import IdentityPrior

        experiment = IdentityPrior()
    out = options.out or Path("runs") / options.experiment
    if options.draw is not None:
        return redraw(experiment, options.draw, out)
    return run_experiment(
        experiment, out, budget=options.budget, seeds=options.seeds, only=options.only, data_dir=options.data_dir,
        threads=options.threads,
    )  # fmt: skip


def _add_diagnose(commands: Any) -> None:
    parser = commands.add_parser(
        "diagnose",
        help="gradients over time, eigenvalues, dead units of trained models",
        description="Look into trained models: gradients over time, estimation error, eigenvalues, dead units.",
    )
    parser.set_defaults(run=_diagnose)
    parser.add_argument("checkpoint", type=Path, nargs="*", help="the checkpoint.pt of a run folder; several compare")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: diagnostics beside the first checkpoint")
    parser.add_argument("--data-dir", default="", metavar="DIR", help=_about("data_dir"))
    parser.add_argument("--first", action="store_true", help="look at the weights before the first update instead")
    parser.add_argument("--draw", type=Path, metavar="FILE", help="measure nothing: pictures of a diagnostics.json")


def _diagnose(options: argparse.Namespace) -> int:
    from .diagnose import diagnose, redraw

    if bool(options.checkpoint) == bool(options.draw):
        raise UserError("diagnose needs a checkpoint, or --draw FILE; not both")
    if options.draw:
        return redraw(options.draw, options.out or options.draw.parent)
    return diagnose(options.checkpoint, options.out, options.data_dir, options.first)


def _add_download(commands: Any) -> None:
    parser = commands.add_parser(
        "download",
        help="fetch MNIST or bAbI from their public home",
        description="Fetch a data set from its public home into the data folder, and check it.",
    )
    parser.set_defaults(run=_download)
    parser.add_argument("name", choices=("mnist", "babi"))
    parser.add_argument("--data-dir", default="", metavar="DIR", help=_about("data_dir"))


def _download(options: argparse.Namespace) -> int:
    folder = data_folder(options.data_dir)
    written = download(options.name, folder)
    print("\n".join(map(str, written)) or f"{options.name} is in {folder} already, and sound")
    return 0


def _add_bench(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="time the RIN on this CPU beside other engines",
        description="Time the RIN on this CPU beside torch, JAX, oneDNN, ONNX Runtime and OpenVINO, each where it is "
        "installed and gives equal outputs. From a checkout; `make bench-peers` installs them first. 20 minutes.",
    )
    parser.set_defaults(run=_bench)
    parser.add_argument("--list", action="store_true", help="run nothing: which peers are here, and the cases")
    parser.add_argument("--peers", default="", metavar="NAMES", help="with commas between (default: all)")
    parser.add_argument("--threads", default="1,2", metavar="N,...", help="default: 1,2")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="cases to run, e.g. 'training-B1-*'")
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds")
    parser.add_argument(
        "--passes", type=int, default=1, metavar="N", help="run all N times; of a row the fastest counts"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: peers.json; a table and pictures beside it")
    parser.add_argument(
        "--compare", type=Path, nargs=2, metavar=("OLD", "NEW"), help="what got slower, exit code 1 if any"
    )
    parser.add_argument("--draw", type=Path, metavar="FILE", help="run nothing: table and pictures of results")


def _bench(options: argparse.Namespace) -> int:
    root = Path(__file__).resolve().parents[3]
    if not (root / "benchmarks" / "peers" / "command.py").exists():
        raise UserError("bench needs the folder benchmarks, which is in a checkout and not in a wheel")
    sys.path.insert(0, str(root))
    try:
        command = importlib.import_module("benchmarks.peers.command")
    except ModuleNotFoundError as error:
        if error.name not in ("pytest", "pytest_benchmark"):
            raise
        raise UserError(f"{error.name} is not installed; bench needs: pip install 'fused-rin[bench]'") from None
    if options.compare:
        return command.compare_files(*options.compare)
    if options.draw:
        return command.redraw(options.draw)
    choice = command.choose(options.peers, options.threads, options.only, options.quick, options.passes)
    if options.list:
        print(command.listing(choice))
        return 0
    return command.measure(choice, options.out or Path("peers.json"))


def _reopen(path: Path, given: dict[str, Any]) -> Run:
    before = Run.open(path).settings
    settings = dataclasses.replace(before, **given)
    settings.refuse_change(before, f"{path}: the run")
    return Run(path, settings)
