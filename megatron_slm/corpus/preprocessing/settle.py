"""Replace old datasets by new ones, so that no crash leaves a mixture of the two.

New datasets are written beside the old ones, as .bin.next and .idx.next.  When those of all keys
are complete, the file of their manifests (OutputPaths.decided) is written.  From then on they are
the datasets, and if this run is killed, the next one completes the replacement.
"""

from __future__ import annotations

from pathlib import Path

from megatron_slm.corpus.preprocessing.output_paths import OutputPaths
from megatron_slm.data.manifest import manifest_path, read_manifest, write_manifest
from megatron_slm.data.manifest_types import DecidedDatasets
from megatron_slm.files import publish


def settle(layout: OutputPaths) -> None:
    """Replace the old datasets by those that are decided on, continuing where an earlier run was
    cut off; remove new datasets that are not decided on."""
    decided = read_manifest(layout.decided, DecidedDatasets)
    for key in layout.keys if decided is None else decided.datasets:
        prefix = layout.dataset(key)
        data, index = (Path(f"{prefix}.{suffix}") for suffix in ("bin", "idx"))
        new_data, new_index = (path.with_name(f"{path.name}.next") for path in (data, index))
        if decided is None:
            new_data.unlink(missing_ok=True)
            new_index.unlink(missing_ok=True)
            continue
        if new_data.exists():  # never leave an index beside other data
            manifest_path(prefix).unlink(missing_ok=True)
            index.unlink(missing_ok=True)
            publish(new_data, data)
        if new_index.exists():
            publish(new_index, index)
        Path(f"{prefix}.data-args.txt").unlink(missing_ok=True)
        write_manifest(manifest_path(prefix), decided.datasets[key])
    layout.decided.unlink(missing_ok=True)
