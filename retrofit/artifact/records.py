"""What `retrofit.json` records of a patch."""

from __future__ import annotations

from typing import Any

from retrofit.patching.patch import Patch


def describe_patch(patch: Patch) -> dict[str, Any]:
    """What a manifest records of a patch."""
    return {
        "family": patch.report.families,
        "recipe": patch.recipe.to_dict(),
        "sites": site_map(patch),
        "changed": list(patch.report.changed),
        "skipped": [[skip.path, skip.reason] for skip in patch.report.skipped],
    }


def site_map(patch: Patch) -> list[dict[str, Any]]:
    """Every patched site: its network, path, index, block and kind."""
    return [
        {
            "network": handler.site.network,
            "path": handler.site.path,
            "index": handler.site.index,
            "block": handler.site.block,
            "kind": handler.site.kind,
        }
        for handler in patch.sites.values()
    ]
