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
    drain_s: Annotated[
        float, typer.Option(min=0, max=86400, help="Seconds that answers in flight get at shutdown.")
    ] = 30.0,
) -> None:
    """Serve the base and every adapter made for it; print the URL on stdout when ready. Ctrl-C drains and stops."""
    import logging
    import sys

    from adapterhub.settings import load_settings
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
        drain_s=drain_s,
        on_ready=typer.echo,
    )
