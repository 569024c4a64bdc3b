"""`hub serve`: one process, one base, any mix of adapters, over OpenAI-compatible HTTP."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add `hub serve` to the command line."""
    app.command("serve")(serve)


def serve(
    host: Annotated[str, typer.Option(help="A loopback address; there are no keys yet.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    max_slots: Annotated[int, typer.Option(min=1, max=1024, help="Adapters on the device at a time.")] = 16,
    preload: Annotated[str | None, typer.Option(help="Adapters to load first, such as summarize,ask@v2.")] = None,
    base: Annotated[str | None, typer.Option(help="Base to serve: short name, hub id or folder.")] = None,
    quantization: Annotated[str | None, typer.Option(help="nf4, int8 or none.")] = None,
    compute: Annotated[
        Literal["float32", "int8"],
        typer.Option(help="float32 multiplies with the base's values; int8 rounds them and is faster."),
    ] = "float32",
    kv_memory_mib: Annotated[int, typer.Option(min=1, help="Memory for keys and values, MiB.")] = 1024,
    host_adapter_mib: Annotated[
        int, typer.Option(min=0, help="Memory for adapters that are in no slot, MiB; they return without the disk.")
    ] = 1024,
    max_batch: Annotated[int, typer.Option(min=1, max=1024, help="Answers computed together in one step.")] = 32,
    prefix_cache: Annotated[
        bool, typer.Option(help="Reuse the computed beginning of prompts of the same adapter.")
    ] = True,
    drain_s: Annotated[
        float, typer.Option(min=0, max=86400, help="Seconds that answers in flight get at shutdown.")
    ] = 30.0,
) -> None:
    """Serve the base and every adapter made for it; print the URL on stdout when ready. Ctrl-C drains and stops."""
    import logging
    import sys

    from adapterhub.settings import load_settings
    from server.engine.sequence import Limits
    from server.serve import serve as serve_base

    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    serve_base(
        load_settings(base=base, quantization=quantization),
        host=host,
        port=port,
        num_slots=max_slots,
        preload=[name.strip() for name in (preload or "").split(",") if name.strip()],
        kv_memory_mib=kv_memory_mib,
        compute=compute,
        limits=Limits(max_sequences=max_batch, prefix_cache=prefix_cache, host_adapter_mib=host_adapter_mib),
        drain_s=drain_s,
        on_ready=typer.echo,
    )
