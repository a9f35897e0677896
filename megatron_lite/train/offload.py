"""Where the state of a run lies: on the device, in main memory, or in files (``offload.*``)."""

from __future__ import annotations

import socket
from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_lite.config.schema import RunConfig
from megatron_lite.distributed import collectives
from megatron_lite.distributed.mesh import Mesh
from megatron_lite.planner.memory import predict
from megatron_lite.utils.memory import return_freed_memory
from megatron_lite.zero.files import OffloadError
from megatron_lite.zero.offload import BucketStream, MappedTensors, OffloadStore, Resident, StoredTensor
from megatron_lite.zero.offload_folder import check_offload_dir


def check_room(config: RunConfig, mesh: Mesh) -> None:
    """Before anything is built. Raises OffloadError where ``offload.dir`` cannot take the files of this host's ranks.

    Every rank calls it.
    """
    if config.offload.dir is not None:
        own = socket.gethostname(), predict(config, mesh.rank, mesh.device.type).state.disk
        of_ranks = collectives.gather_objects(own, mesh.world)
        here = [files for host, files in of_ranks if host == own[0]]
        try:
            check_offload_dir(config.offload.dir, sum(here), len(here))
        except OffloadError as error:
            if len(here) == len(of_ranks):
                raise
            raise OffloadError(f"on {own[0]}: {error}") from error  # which ranks of all hosts raise


class StateMemory:
    """Makes the tensors of a rank's state where the config wants them, and gives them back at the end.

    Raises OffloadError where ``offload.dir`` cannot be used.
    """

    def __init__(self, config: RunConfig, mesh: Mesh) -> None:
        self._device = mesh.device
        self._places = {category: getattr(config.offload, category) for category in _CATEGORIES}
        self.moments: dict[str, dict[str, StoredTensor]] = {}  # by bucket and kind
        self._store: OffloadStore | None = None
        if any(place != "none" for place in self._places.values()):
            return_freed_memory()  # where memory is short
            directory = config.offload.dir if "nvme" in self._places.values() else None
            self._store = OffloadStore(directory, run=config.run.name, rank=mesh.rank, device=mesh.device)

    def keep(self, category: str, name: str, numel: int, dtype: torch.dtype) -> StoredTensor:
        """A tensor of zeros. category: optimizer, gradients or parameters. What is offloaded of the first two is used
        on the CPU, by the optimizer."""
        place = self._places[category]
        if place == "none" or numel == 0 or self._store is None:
            return Resident(torch.zeros(numel, dtype=dtype, device=self._device))
        used_on = self._device if category == "parameters" else torch.device("cpu")
        return self._store.tensor(place, name, numel, dtype, used_on=used_on)

    def keep_moments(self, bucket: str, dtype: torch.dtype, sizes: Mapping[str, int]) -> Mapping[str, Tensor]:
        """What an optimizer keeps of a bucket. sizes: numbers of elements, by kind."""
        made = {kind: self.keep("optimizer", f"{bucket}.{kind}", size, dtype) for kind, size in sizes.items()}
        self.moments[bucket] = made
        return MappedTensors(made)

    def stream(self, stored: Mapping[str, Mapping[str, StoredTensor]]) -> BucketStream:
        """For the updates: all of what lasts of each bucket, moments included, as it is needed. stored: by bucket."""
        tensors = {name: {**kinds, **self.moments[name]} for name, kinds in stored.items()}
        return BucketStream(tensors, pinned=self._device.type == "cuda")

    @property
    def uses_files(self) -> bool:
        return "nvme" in self._places.values()

    def close(self) -> None:
        """Removes files. No tensor that was made here may be used afterwards."""
        if self._store is not None:
            self._store.close()


_CATEGORIES = ("optimizer", "gradients", "parameters")
