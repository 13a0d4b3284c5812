"""`hybrimoe models`: local models and their experts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybrimoe.cli.console import note, output_console, size_text
from hybrimoe.cli.options import HELP_NAMES, finish
from hybrimoe.cli.report import table
from hybrimoe.errors import UsageError

if TYPE_CHECKING:
    from hybrimoe.gguf_model import GgufModel, MoeLayer
    from hybrimoe.models.store import ModelEntry

_JSON = typer.Option("--json/--no-json", help="Print JSON.", show_default=False)
# A context to judge "fits here" by; models' own are often larger than anyone needs.
_USUAL_CTX = 4096


def make_app() -> typer.Typer:
    """The commands below `hybrimoe models`."""
    app = typer.Typer(help="Local models: list, show, pull, build.", context_settings=HELP_NAMES, rich_markup_mode=None)

    @app.callback(invoke_without_command=True)
    def start(context: typer.Context) -> None:
        if context.invoked_subcommand is None:
            print(context.get_help())

    @app.command("list", context_settings=HELP_NAMES)
    def list_(as_json: Annotated[bool, _JSON] = False) -> None:
        """List the models of the store, their experts, and whether they fit into this machine's memory."""
        finish(lambda: _list(as_json))

    @app.command(context_settings=HELP_NAMES)
    def show(
        model: Annotated[str, typer.Argument(metavar="NAME or FILE", help="A known model's name or a GGUF file.")],
        as_json: Annotated[bool, _JSON] = False,
    ) -> None:
        """Show what a model consists of: architecture, experts, bytes per expert and layer."""
        finish(lambda: _show(model, as_json))

    @app.command(context_settings=HELP_NAMES)
    def pull(
        repo: Annotated[str, typer.Argument(metavar="USER/REPO[:QUANT]", help="A repository of a Hugging Face hub.")],
        list_: Annotated[
            bool,
            typer.Option("--list/--no-list", help="List what it offers with experts.", show_default=False),
        ] = False,
        force: Annotated[
            bool, typer.Option("--force/--no-force", help="Download what does not fit here, too.", show_default=False)
        ] = False,
        as_json: Annotated[bool, _JSON] = False,
    ) -> None:
        """Download a model with experts, if it fits this machine. Prints the file's path.

        Hashes are checked; an interrupted download goes on when the command is given again. HF_TOKEN and HF_ENDPOINT
        are honoured.
        """
        from hybrimoe.cli import hub

        finish(lambda: hub.list_offers(repo, as_json) if list_ else hub.pull(repo, force=force, as_json=as_json))

    @app.command(context_settings=HELP_NAMES)
    def build(
        name: Annotated[str, typer.Argument(metavar="demo", help="What to build; there is a recipe for 'demo'.")],
        experts: Annotated[int | None, typer.Option("--experts", metavar="N", help="Experts per layer.")] = None,
        top_k: Annotated[int | None, typer.Option("--top-k", metavar="K", help="Experts used per token.")] = None,
        kind: Annotated[str | None, typer.Option("--type", metavar="TYPE", help="Quantisation, such as Q4_1.")] = None,
        layers: Annotated[int | None, typer.Option("--layers", metavar="N", help="Layers, from the first.")] = None,
        force: Annotated[
            bool, typer.Option("--force/--no-force", help="Build again what exists.", show_default=False)
        ] = False,
    ) -> None:
        """Build a model from its recipe. Prints the file's path."""
        finish(lambda: _build(name, experts, top_k, kind, layers, force))

    return app


def _list(as_json: bool) -> None:
    from hybrimoe.models import store

    entries = [_entry(entry) for entry in store.list_models()]
    if as_json:
        print(json.dumps(entries, ensure_ascii=False, indent=1))
        return
    head = ["name", "architecture", "layers", "experts", "top-k", "type", "size", "fits here"]
    output_console().print(table(head, [_row(entry) for entry in entries]))
    if any(entry["path"] is None for entry in entries):
        note("", "hybrimoe models build demo")


def _entry(entry: ModelEntry) -> dict[str, Any]:
    """One model as JSON-able data; `error` says why a model has no more than its name."""
    data: dict[str, Any] = {"name": entry.name, "path": str(entry.path) if entry.path else None, "error": entry.error}
    if entry.model is not None:
        data = {**entry.model.to_dict(), **data, "title": entry.model.name, "fits": _fits(entry.model)}
        del data["layers"]
    return data


def _fits(model: GgufModel) -> bool:
    """Whether weights and a usual KV cache fit into memory at once; a larger model runs, but from the disk."""
    from hybrimoe.machine import host

    n_ctx = min(_USUAL_CTX, model.n_ctx_train or _USUAL_CTX)
    memory = host.memory()
    most = min(memory.total_bytes, memory.limit_bytes or memory.total_bytes)
    return model.total_bytes + model.kv.bytes_for(n_ctx) <= most


def _row(entry: dict[str, Any]) -> list[str]:
    if entry["error"]:
        return [entry["name"], f"({entry['error']})", "", "", "", "", "", ""]
    names = ("name", "architecture", "n_layers", "n_experts", "n_experts_used", "file_type")
    return [*(str(entry[n]) for n in names), size_text(entry["file_bytes"]), "yes" if entry["fits"] else "no"]


def _show(name: str, as_json: bool) -> None:
    from hybrimoe.gguf_model import inspect
    from hybrimoe.models import store

    model = inspect(store.resolve(name).absolute())
    if as_json:
        data = {**model.to_dict(), "name": name, "title": model.name, "fits": _fits(model)}
        print(json.dumps(data, ensure_ascii=False, indent=1))
        return
    output_console().print(_description(model))


def _description(model: GgufModel) -> str:
    experts = f"{model.n_experts} experts, top-{model.n_experts_used}" if model.is_moe else "no experts"
    if model.n_shared_experts:
        experts += f", {model.n_shared_experts} shared"
    if model.n_expert_groups > 1:
        experts += f", {model.n_expert_groups_used} of {model.n_expert_groups} groups"
    template = "yes" if model.chat_template else "no"
    lines = [
        f"{model.name}",
        f"path          {model.path}" + (f" (and {len(model.parts) - 1} more parts)" if len(model.parts) > 1 else ""),
        f"architecture  {model.architecture}, {model.n_layers} layers, {model.n_embd} wide, "
        f"{model.n_params / 1e6:.0f} M parameters",
        f"experts       {experts}",
        f"type          {model.file_type}",
        f"size          {size_text(model.total_bytes)}: experts {size_text(model.expert_bytes)}, "
        f"the rest {size_text(model.dense_bytes)}",
        f"per token     {size_text(model.active_bytes)} of weights are read",
        f"context       {model.n_ctx_train} tokens, {size_text(model.kv.bytes_for(1))} of KV cache each",
        f"chat template {template}",
        f"fits here     {'yes' if _fits(model) else 'no: larger than memory, it would run from the disk'}",
    ]
    if model.is_moe:
        head = ["layers", "experts", "top-k", "type", "per expert", "all", "shared"]
        lines += ["", table(head, _layer_rows(model.moe_layers))]
    return "\n".join(lines)


def _layer_rows(layers: tuple[MoeLayer, ...]) -> list[list[str]]:
    """One row for every run of layers that are alike."""
    rows: list[tuple[int, int, list[str]]] = []
    for layer in layers:
        cells = [
            str(layer.n_experts),
            str(layer.n_experts_used),
            "/".join(layer.expert_types),
            size_text(layer.bytes_per_expert),
            size_text(layer.expert_bytes),
            size_text(layer.shared_bytes),
        ]
        if rows and rows[-1][2] == cells and rows[-1][1] == layer.index - 1:
            rows[-1] = (rows[-1][0], layer.index, cells)
        else:
            rows.append((layer.index, layer.index, cells))
    return [[str(first) if first == last else f"{first}-{last}", *cells] for first, last, cells in rows]


def _build(
    name: str, n_experts: int | None, top_k: int | None, kind: str | None, n_layers: int | None, force: bool
) -> None:
    if name != "demo":
        raise UsageError(f"there is no recipe for '{name}'", "hybrimoe models build demo")
    from hybrimoe.cli.loading import build_demo
    from hybrimoe.models.recipe import DemoOptions

    print(build_demo(DemoOptions(n_experts, top_k, kind, n_layers), force=force))
