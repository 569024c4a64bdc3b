"""`hub adapters`: list, show, import, export and verify published versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapterhub.cli.tables import print_table

if TYPE_CHECKING:
    from rich.table import Table

    from adapterhub.records import EffectReport, EvaluationRecord, Manifest, TrainingRecord
    from adapterhub.store import Alias, Version

__all__ = ["register"]

_SHORT_DIGEST_CHARS = 12

adapters_app = typer.Typer(help="Published adapters: every version and what it was made of.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")]
Ref = Annotated[str, typer.Argument(help="task, task@v2, task@alias, task@sha256:... or sha256:...")]


def register(app: typer.Typer) -> None:
    """Add `hub adapters` to the command line."""
    app.add_typer(adapters_app, name="adapters")


def _version_json(version: Version, aliases: list[Alias]) -> dict[str, Any]:
    return {
        "label": version.label,
        "task": version.task,
        "version": version.number,
        "method": str(version.method),
        "serving_digest": version.serving_digest,
        "manifest_digest": version.manifest_digest,
        "base_digest": version.base_digest,
        "aliases": _alias_names(version, aliases),
        "created_at": version.created_at.isoformat(),
    }


def _alias_names(version: Version, aliases: list[Alias]) -> list[str]:
    return [alias.name for alias in aliases if (alias.task, alias.number) == (version.task, version.number)]


@adapters_app.command("list")
def list_(task: Annotated[str | None, typer.Argument(help="Only this task.")] = None, json_: Json = False) -> None:
    """List every version with its aliases."""
    from adapterhub.settings import load_settings
    from adapterhub.store import Store

    with Store.open(load_settings().store_dir) as store:
        versions, aliases = store.versions(task), store.aliases(task)
        if task is not None and not versions:
            store.get_version(task)  # Says which tasks there are.
    if json_:
        typer.echo(json.dumps([_version_json(version, aliases) for version in versions]))
        return
    if not versions:
        from rich.console import Console

        Console(stderr=True).print("Nothing is published yet: `hub train --task T` or `hub adapters import FOLDER`.")
        return
    rows = [
        (
            version.label,
            str(version.method),
            ", ".join(_alias_names(version, aliases)),
            version.serving_digest[:_SHORT_DIGEST_CHARS],
            version.base_digest[:_SHORT_DIGEST_CHARS],
            f"{version.created_at:%Y-%m-%d %H:%M}",
        )
        for version in versions
    ]
    columns = ("adapter", "method", "aliases", "serving digest", "base digest", "published (UTC)")
    print_table(columns, rows, folding=("aliases",))


@adapters_app.command()
def show(ref: Ref, json_: Json = False) -> None:
    """Show what a version is: method, base, data, training and evaluation against the base."""
    from adapterhub.settings import load_settings
    from adapterhub.store import Store

    with Store.open(load_settings().store_dir) as store:
        version = store.get_version(ref)
        manifest = store.manifest(version)
        aliases = store.aliases(version.task)
        effect = store.find_effect(version.serving_digest)
    if json_:
        parts = {
            "manifest": manifest.model_dump(mode="json"),
            "effect": effect.model_dump(mode="json") if effect else None,
        }
        typer.echo(json.dumps(_version_json(version, aliases) | parts))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    _add_identity(table, version, manifest, _alias_names(version, aliases))
    _add_training(table, manifest.training)
    _add_evaluation(table, manifest.evaluation)
    _add_effect(table, version, effect)
    Console().print(table)


def _add(table: Table, name: str, value: str) -> None:
    from rich.markup import escape

    table.add_row(name, escape(value))  # A target pattern such as `[qv]_proj` is not markup.


def _add_identity(table: Table, version: Version, manifest: Manifest, aliases: list[str]) -> None:
    _add(table, "adapter", version.label)
    _add(table, "aliases", ", ".join(aliases) or "none")
    _add(table, "published", f"{version.created_at:%Y-%m-%d %H:%M:%S} UTC")
    rank = "" if manifest.rank is None else f", rank {manifest.rank}"
    alpha = "" if manifest.alpha is None else f", alpha {manifest.alpha:g}"
    _add(table, "method", f"{manifest.method}{rank}{alpha}")
    _add(table, "targets", ", ".join(manifest.target_modules))
    _add(table, "tensors", str(len(manifest.tensors)))
    _add(table, "base", f"{manifest.base.name}, {manifest.base.quantization}, sha256:{manifest.base.digest}")
    _add(table, "serving digest", f"sha256:{version.serving_digest}")
    _add(table, "manifest digest", f"sha256:{version.manifest_digest}")


def _add_training(table: Table, training: TrainingRecord | None) -> None:
    if training is None:
        _add(table, "training", "unknown: the adapter was imported")
        return
    tokens = f"{training.num_train_tokens:,} tokens, {training.num_trainable_parameters:,} trainable parameters"
    _add(table, "training", f"{tokens}, {training.wall_time_s:.0f} s, seed {training.seed}")
    _add(table, "code", training.code_revision)
    for name, digest in sorted(training.data_digests.items()):
        _add(table, "data", f"{name} sha256:{digest}")
    for parent in training.parents:
        _add(table, "parent", f"sha256:{parent}")


def _add_evaluation(table: Table, evaluation: EvaluationRecord | None) -> None:
    if evaluation is None:
        _add(table, "evaluation", "none")
        return
    scores = f"base {evaluation.base_score:.4f}, adapter {evaluation.adapter_score:.4f}"
    interval = f"[{evaluation.interval_low:+.4f}, {evaluation.interval_high:+.4f}]"
    _add(table, "evaluation", f"{evaluation.metric} on {evaluation.num_rows} held-out rows: {scores}")
    _add(
        table, "difference", f"{evaluation.difference:+.4f}, {evaluation.confidence:.0%} confidence interval {interval}"
    )


def _add_effect(table: Table, version: Version, effect: EffectReport | None) -> None:
    if effect is None:
        _add(table, "effect", f"not measured; POST /admin/v1/adapters/{version.label}/load on a server does it")
        return
    largest = max(effect.modules, key=lambda name: effect.modules[name].relative_size)
    counted = f"{len(effect.modules)} linears changed, {effect.num_untouched} left alone"
    _add(table, "effect", counted + (f", {effect.num_pruned} cut to rank 0" if effect.num_pruned else ""))
    if effect.unmatched_targets:
        _add(table, "targets without linear", ", ".join(effect.unmatched_targets))
    _add(
        table,
        "change of weights",
        f"{effect.total_relative_size:.2%} of the base in all, {effect.median_relative_size:.2%} in the median linear, "
        f"{effect.max_relative_size:.2%} in {largest}",
    )
    if effect.probe is not None:
        probe = effect.probe
        moved = f"KL {probe.kl:.4g} nats, log probabilities moved by up to {probe.max_logprob_difference:.3g}"
        _add(table, "probe", f"{moved}, after {probe.prompt!r}")


@adapters_app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(help="PEFT adapter folder: adapter_config.json and safetensors.")],
    task: Annotated[str, typer.Option(help="Task to publish it under.")],
    base: Annotated[str | None, typer.Option(help="Base it was trained on; the configured base by default.")] = None,
    quantization: Annotated[str | None, typer.Option(help="How that base was quantized: nf4, int8 or none.")] = None,
    trust_base: Annotated[
        bool, typer.Option("--trust-base", help="It fits although adapter_config.json names another base.")
    ] = False,
    json_: Json = False,
) -> None:
    """Check a PEFT folder of any of the five methods and publish it as a new version."""
    from rich.console import Console

    from adapterhub.base.catalogue import find_base
    from adapterhub.settings import load_settings
    from adapterhub.store import Store

    settings = load_settings(quantization=quantization)
    with Store.open(settings.store_dir) as store:
        version = store.publish(folder, task=task, base=find_base(base, settings), trust_base=trust_base)
        aliases = store.aliases(task)
    typer.echo(json.dumps(_version_json(version, aliases)) if json_ else version.label)
    names = ", ".join(_alias_names(version, aliases))
    Console(stderr=True).print(
        f"{version.method} adapter, serving digest sha256:{version.serving_digest}", soft_wrap=True
    )
    Console(stderr=True).print(
        f"aliases: {names}" if names else f"Serve it with `hub alias set {task}@stable {version.label}`."
    )


@adapters_app.command()
def export(ref: Ref, folder: Annotated[Path, typer.Argument(help="New folder to write.")]) -> None:
    """Write a version as a PEFT folder, after hashing every file again."""
    from adapterhub.settings import load_settings
    from adapterhub.store import Store

    with Store.open(load_settings().store_dir) as store:
        typer.echo(store.export(ref, folder))


@adapters_app.command()
def verify(
    refs: Annotated[list[str] | None, typer.Argument(help="Versions to check; all of them by default.")] = None,
    json_: Json = False,
) -> None:
    """Hash stored files again and derive each serving digest anew. Exit code 1 when anything differs."""
    from rich.console import Console
    from rich.markup import escape

    from adapterhub.settings import load_settings
    from adapterhub.store import Store

    with Store.open(load_settings().store_dir) as store:
        failures = store.find_damage(refs or None)
        labels = refs or [version.label for version in store.versions()]
    if json_:
        rows = [{"label": label, "error": failures[label].what if label in failures else None} for label in labels]
        typer.echo(json.dumps(rows))
    stderr = Console(stderr=True, soft_wrap=True)
    for label, error in failures.items():
        stderr.print(f"[bold red]damaged[/] {label}: {escape(str(error))}")
    stderr.print(f"{len(labels) - len(failures)} of {len(labels)} versions are intact.")
    if failures:
        raise typer.Exit(code=1)
