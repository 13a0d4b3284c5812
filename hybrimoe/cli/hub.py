"""`hybrimoe models pull`, and `-hf` of the commands that take a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hybrimoe.cli.console import output_console, size_text, stages
from hybrimoe.cli.report import table
from hybrimoe.errors import DoesNotFitError, ModelError


def model_from_hub(text: str, *, header_only: bool) -> Path:
    """The file of `user/repo[:quant]`, downloaded where it is missing; `header_only`: one without its weights."""
    from hybrimoe.llama_log import llama_log
    from hybrimoe.models.hub import Reference, Repository, pull

    llama_log()
    reference = Reference.parse(text)
    with stages() as update:
        if not header_only:
            return pull(reference, update)
        repository = Repository(reference.repo)
        return repository.inspect(repository.choose(reference.quant), update).path


def pull(text: str, *, force: bool, as_json: bool) -> None:
    from hybrimoe.llama_log import llama_log
    from hybrimoe.models import hub

    llama_log()
    with stages() as update:
        path = hub.pull(hub.Reference.parse(text), update, force=force)
    print(json.dumps({"path": str(path)}, ensure_ascii=False) if as_json else path)


def list_offers(text: str, as_json: bool) -> None:
    """Models with experts only, smallest first."""
    from hybrimoe.llama_log import llama_log
    from hybrimoe.models.hub import Reference, Repository

    llama_log()
    reference = Reference.parse(text)
    repository = Repository(reference.repo)
    rows: list[dict[str, Any]] = []
    with stages() as update:
        for offer in repository.offers():
            if reference.quant is None or reference.quant.lower() == offer.quant.lower():
                rows += _row(repository, offer, update)
    if not rows:
        raise ModelError(f"'{reference}' offers no model with experts", "hybrimoe runs Mixture-of-Experts models")
    if as_json:
        print(json.dumps(rows, ensure_ascii=False, indent=1))
        return
    head = ["quant", "size", "parts", "experts", "top-k", "fits here", "pull with"]
    cells = [
        [
            row["quant"],
            size_text(row["n_bytes"]),
            str(row["n_files"]),
            str(row["n_experts"]),
            str(row["n_experts_used"]),
            "yes" if row["fits"] else "no",
            f"hybrimoe models pull {reference.repo}:{row['quant']}",
        ]
        for row in rows
    ]
    output_console().print(table(head, cells))


def _row(repository: Any, offer: Any, update: Any) -> list[dict[str, Any]]:
    from hybrimoe.models.hub import check_fits

    try:
        model = repository.inspect(offer, update).require_moe()
    except ModelError:
        return []
    try:
        check_fits(model, offer)
        fits, reason = True, ""
    except DoesNotFitError as error:
        fits, reason = False, error.message
    return [
        {
            "quant": offer.quant,
            "name": offer.name,
            "n_files": len(offer.files),
            "n_bytes": offer.n_bytes,
            "architecture": model.architecture,
            "n_experts": model.n_experts,
            "n_experts_used": model.n_experts_used,
            "fits": fits,
            "reason": reason,
        }
    ]
