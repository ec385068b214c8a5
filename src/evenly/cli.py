"""The ``evenly`` command. Each command parses its options and calls the library; nothing is computed here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="evenly",
    help="Normalization and group methods: compare them, convert a trained model, check the claims.",
    no_args_is_help=True,
    rich_markup_mode="markdown",  # "rich" would swallow "[default: ...]" in a help text
    pretty_exceptions_enable=False,
)


@app.command("list")
def list_(
    area: Annotated[str | None, typer.Option(help="Only this area (nn, weights, optim, ...).")] = None,
    todo: Annotated[bool, typer.Option("--todo", help="Only methods that are not done.")] = False,
    done: Annotated[bool, typer.Option("--done", help="Only methods that are done.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the methods: id, area, state, paper, title. Tab-separated lines when piped."""
    from evenly import cards, catalog, terminal

    if todo and done:
        raise typer.BadParameter("--todo and --done exclude each other; give neither to see both")
    with _usage(catalog.CatalogError):
        rows = cards.listing(area, "planned" if todo else "done" if done else None)
    if json:
        _print_json([{**vars(row), "stage": row.stage, "link": row.link} for row in rows])
        return
    terminal.table(
        ["id", "area", "state", "paper", "title"],
        [(row.id, row.area, row.stage, row.arxiv or row.link, row.title) for row in rows],
        title=f"{len(rows)} methods, {sum(row.done for row in rows)} done",
        nowrap=["id", "area", "state"],
        styles=["green" if row.done else "" for row in rows],
    )


@app.command()
def show(
    id: Annotated[str, typer.Argument(help="A method's id, as `evenly list` prints it.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show one method: its paper, its objects, what its claim found, and how to run it."""
    from evenly import cards, catalog, terminal

    with _usage(catalog.CatalogError):
        facts = cards.card(id)
    if json:
        _print_json(facts)
        return
    terminal.pairs(facts["id"], cards.render(facts))


@app.command()
def claim(
    id: Annotated[str | None, typer.Argument(help="The id of a method that has a claim.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every claim.")] = False,
    budget: Annotated[str, typer.Option(help="full decides; small is a smoke test of seconds.")] = "full",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for ID.json and ID.svg. [default: docs/claims of the checkout]"),
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes. [default: one a core, at most 2]")] = None,
) -> None:
    """Check what a paper claims: train baseline and method over the seeds, judge, keep the numbers.

    A run that is stopped goes on where it was when started again.
    """
    from evenly import catalog, claims, terminal

    if (id is None) != all_:
        raise typer.BadParameter("give one ID, or --all")
    with _usage(claims.ClaimError, catalog.CatalogError):
        for chosen in [claims.get(name) for name in (claims.available() if id is None else [id])]:
            with terminal.progress() as report:
                result = claims.run_claim(chosen, budget, out=out, workers=workers, progress=report)
            terminal.table(
                ["claim", "metric", "baseline", "method"],
                claims.rows(result),
                title=f"{result['id']}: median [lowest, highest] over the seeds",
            )
            terminal.pairs(result["id"], claims.verdict(result))


@app.command()
def convert(
    model: Annotated[str, typer.Option(help="module:factory, called without arguments.")],
    to: Annotated[str, typer.Option(help="batch, frozen, layer, group, instance, rms, none, folded, ...")],
    out: Annotated[Path, typer.Option(help="Where the weights go (.safetensors).")],
    weights: Annotated[
        Path | None, typer.Option(help="State dict: .safetensors, or a torch file of tensors only.")
    ] = None,
    calibrate: Annotated[
        Path | None, typer.Option(help="Folder of images, or of .npy or .safetensors batches; no labels needed.")
    ] = None,
    groups: Annotated[int | None, typer.Option(min=1, help="Number of groups, for --to group.")] = None,
    refine: Annotated[int | None, typer.Option(min=1, help="Steps of self-distillation on the same data.")] = None,
    lr: Annotated[float, typer.Option(help="Learning rate of --refine.")] = 3e-3,
    only: Annotated[list[str] | None, typer.Option(help="A layer, a module above it, or a pattern.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Inputs used for calibration.")] = 1000,
    size: Annotated[str | None, typer.Option(help="Resize images, such as 224x224.")] = None,
    mean: Annotated[str, typer.Option(help="Subtracted from images in [0, 1], such as 0.485,0.456,0.406.")] = "0",
    std: Annotated[str, typer.Option(help="Images are divided by this afterwards.")] = "1",
    gray: Annotated[bool, typer.Option("--gray", help="Read images with one channel.")] = False,
    report: Annotated[Path | None, typer.Option(help="Write the report here, as JSON.")] = None,
) -> None:
    """Change the normalization of a trained network without training it again.

    `evenly.conversion.load_converted(factory(), OUT)` reads the result. No file is unpickled.
    """
    import json

    from evenly import conversion

    with _usage(ValueError, TypeError, OSError):
        if out.suffix != ".safetensors":
            raise ValueError(f"--out {out} must end in .safetensors.")
        network = conversion.build(model)
        if weights is not None:
            try:
                network.load_state_dict(conversion.load_weights(weights))
            except RuntimeError as error:  # keys or shapes that do not fit, which it lists
                raise ValueError(f"{weights} does not fit --model {model}: {error}") from error
        data = None
        if calibrate is not None:
            pixels = None if size is None else _numbers(size, "x", int)
            if pixels is not None and len(pixels) != 2:
                raise ValueError(f"--size {size} is not HEIGHTxWIDTH.")
            files = conversion.InputFiles(
                calibrate,
                size=None if pixels is None else (pixels[0], pixels[1]),
                mean=_numbers(mean, ",", float),
                std=_numbers(std, ",", float),
                gray=gray,
            )
            data = conversion.Calibration(files, samples=samples)
        steps = None if refine is None else conversion.Refinement(steps=refine, lr=lr)
        converted, result = conversion.convert(
            network, to, calibrate=data, refine=steps, only=only or None, groups=groups
        )
        conversion.save_converted(converted, network, result, out)
        if report is not None:
            text = json.dumps(result.to_dict(), indent=2, ensure_ascii=False) + "\n"
            conversion.write_atomically(report, text.encode())
    typer.echo(str(result))


@app.command()
def doctor(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, devices, which backend serves which operator, and what each extra would add."""
    from evenly import doctor as doctor_
    from evenly import terminal

    facts = doctor_.report()
    if json:
        _print_json(facts)
        return
    terminal.pairs("evenly doctor", doctor_.render(facts))


@app.command()
def compare(
    norms: Annotated[
        str | None,
        typer.Option(help="Names with commas between, module:attribute, or all. [default: ten that fit]"),
    ] = None,
    data: Annotated[
        str, typer.Option(help="digits, breast_cancer, mnist:DIR, folder:DIR, csv:FILE:TARGET, text or text:FILE.")
    ] = "digits",
    ood: Annotated[str | None, typer.Option(help="Second data of the same classes: train here, test there.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="resnet, mlp, gpt or module:factory. [default: resnet for images, gpt for text, else mlp]"),
    ] = None,
    batch_sizes: Annotated[str | None, typer.Option(help="With commas between. [default: 4,64; on text 16]")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many. [default: 3]")] = None,
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help="Passes over the training set. [default: 110 steps, at least 2; on text 240 steps]"),
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate. [default: 0.02 * sqrt(batch size / 64), searched around]")
    ] = None,
    tune: Annotated[
        bool | None,
        typer.Option("--tune/--no-tune", help="Search the learning rate. [default: yes, unless --lr or --quick]"),
    ] = None,
    rank_by: Annotated[
        str | None, typer.Option(help="mpc, clean, rpc, worst, domain or ood; on text bits. [default: mpc, bits]")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    engine: Annotated[str, typer.Option(help="local or ray.")] = "local",
    address: Annotated[str | None, typer.Option(help="Address of a running Ray cluster.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Trials at a time. [default: one a core]")] = None,
    out: Annotated[Path, typer.Option(help="Output folder; give it again to go on.")] = Path("evenly-compare"),
    quick: Annotated[bool, typer.Option("--quick", help="A first look in half a minute.")] = False,
) -> None:
    """Which normalization should I use for my model and my data? Train with each, and rank them."""
    import shlex
    import sys

    from evenly.workbench import StoreError
    from evenly.workbench import compare as run

    with _usage(ValueError, ImportError, ConnectionError, OSError, StoreError), _interruptible():
        run(
            None if norms is None else _commas(norms),
            data=data,
            ood=ood,
            model=model,
            batch_sizes=None if batch_sizes is None else _integers("--batch-sizes", batch_sizes),
            seeds=seeds,
            epochs=epochs,
            lr=lr,
            tune=tune,
            rank_by=rank_by,
            device=device,
            engine=engine,
            address=address,
            workers=workers,
            out=out,
            quick=quick,
            command=shlex.join(["evenly", *sys.argv[1:]]),
        )


@app.command()
def audit(
    data: Annotated[
        str, typer.Option(help="FILE.csv, FILE.parquet, adult:DIR, compas:DIR or folder:DIR (images and groups.csv).")
    ],
    groups: Annotated[str, typer.Option(help="Columns with commas between; numbers with bins: sex,age:25,45,65.")],
    target: Annotated[
        str | None, typer.Option(help="Column of targets. [adult, compas: target; folder: class]", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="module:factory, a .skops file, or a pickle with --trust-pickle.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="State dict of a PyTorch model, such as in.safetensors.")] = None,
    prediction: Annotated[str | None, typer.Option(help="Column of predictions, instead of a model.")] = None,
    score: Annotated[str | None, typer.Option(help="Column of scores of the positive class.")] = None,
    positive: Annotated[str | None, typer.Option(help="The positive value of the target. [0/1: 1]")] = None,
    threshold: Annotated[float | None, typer.Option(help="Scores from here on are predicted positive.")] = None,
    task: Annotated[str | None, typer.Option(help="binary, multiclass or regression. [default: by the target]")] = None,
    classes: Annotated[
        str | None, typer.Option(help="Classes in the order of a network's outputs. [default: sorted]")
    ] = None,
    features: Annotated[
        str | None, typer.Option(help="Columns that the model reads. [default: those it was fitted on]")
    ] = None,
    outputs: Annotated[str, typer.Option(help="What a network gives: logits or probabilities.")] = "logits",
    intersections: Annotated[int, typer.Option(min=1, help="Up to how many columns are crossed; 1: none.")] = 2,
    min_group: Annotated[int, typer.Option(min=1, help="Groups of fewer rows are flagged as small.")] = 30,
    confidence: Annotated[float, typer.Option(help="Of the intervals; the tests' level is 1 minus this.")] = 0.95,
    rank_by: Annotated[
        str | None, typer.Option(help="The measure that says what is worst. [default: accuracy, mae]")
    ] = None,
    resamples: Annotated[int, typer.Option(min=100, help="Of the bootstrap.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the report here (.html).")] = None,
    json: Annotated[Path | None, typer.Option(help="Write everything here, as JSON.")] = None,
    trust: Annotated[list[str] | None, typer.Option(help="A type that a .skops file may hold.")] = None,
    trust_pickle: Annotated[bool, typer.Option("--trust-pickle", help="Unpickle: only files you made.")] = False,
) -> None:
    """How well does a model serve each group? Accuracy, calibration and selection rates, worst group first."""
    import shlex
    import sys

    from evenly import terminal
    from evenly.workbench import auditing

    with _usage(ValueError, TypeError, OSError, ImportError):
        read = auditing.read_data(data)
        with terminal.progress() as report:
            result = auditing.audit_table(
                read,
                target=target,
                groups=groups,
                model=None
                if model is None
                else auditing.load_model(model, weights, trust=trust or (), trust_pickle=trust_pickle),
                prediction=prediction,
                score=score,
                positive=positive,
                threshold=threshold,
                task=task,
                classes=None if classes is None else auditing.labels_like(read, target, _commas(classes)),
                features=None if features is None else _commas(features),
                outputs=outputs,
                intersections=intersections,
                min_group=min_group,
                confidence=confidence,
                rank_by=rank_by,
                resamples=resamples,
                seed=seed,
                progress=report,
            )
        if out is not None:
            result.to_html(out, command=shlex.join(["evenly", *sys.argv[1:]]))
        if json is not None:
            result.to_json(json)
    result.print()
    for file in (out, json):
        if file is not None:
            typer.echo(f"written: {file}", err=True)


@contextlib.contextmanager
def _usage(*errors: type[Exception]) -> Iterator[None]:
    # A wrong argument ends with its message and exit code 2, without a traceback.
    try:
        yield
    except errors as error:
        typer.echo(f"evenly: {error}", err=True)
        raise typer.Exit(2) from error


def _numbers(text: str, separator: str, kind: Callable[[str], Any]) -> tuple[Any, ...]:
    try:
        return tuple(kind(part) for part in text.split(separator))
    except ValueError as error:
        raise ValueError(f"{text!r} is not a list of numbers separated by {separator!r}.") from error


def _print_json(value: object) -> None:
    import json

    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    # Ctrl-C: the library has said how to go on; the exit code is the shell's for an interrupt.
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _commas(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _integers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in _commas(text)]
    except ValueError as error:
        raise typer.BadParameter(f"{option} is {text!r}, expected whole numbers with commas between") from error


def main() -> None:
    """Run the command line."""
    app()
