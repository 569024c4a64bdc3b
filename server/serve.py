"""One server process from start to end: address, base, store, engine, HTTP.

Heavy imports wait until the address is taken.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Literal

from adapterhub.base.catalogue import find_base
from adapterhub.settings import Settings
from server.engine.sequence import Limits
from server.http.run import bind, run, url_of

__all__ = ["serve"]


def serve(
    settings: Settings,
    *,
    host: str,
    port: int,
    num_slots: int,
    preload: Sequence[str],
    kv_memory_mib: int,
    compute: Literal["float32", "int8"],
    limits: Limits,
    drain_s: float,
    on_ready: Callable[[str], None],
) -> None:
    """Serve the configured base until SIGTERM or SIGINT; `on_ready` gets the URL.

    preload: references of adapters to load before the first request. compute: see `server.products.pick_products`.
    Raises PortInUseError, BaseNotPulledError, UserInputError, and what resolving or loading those adapters raises.
    """
    with bind(host, port) as listener:
        base = find_base(None, settings)
        from adapterhub.base.loading import load_tokenizer, use_threads
        from adapterhub.store import Store
        from server.engine.build import build_engine
        from server.http import AdapterNames, create_app

        use_threads(settings)
        with Store.open(settings.store_dir) as store:
            names = AdapterNames(store, base)
            handles = [handle for name in preload if (handle := names.resolve(name).handle) is not None]
            engine = build_engine(
                base, num_slots=num_slots, kv_memory_mib=kv_memory_mib, compute=compute, limits=limits
            )
            app = create_app(engine, store, base, load_tokenizer(base))
            asyncio.run(
                run(app, listener, preload=handles, drain_s=drain_s, on_ready=lambda: on_ready(url_of(listener)))
            )
