"""TPUs that are not here, by their topology's name: to compile for, not to run on.

libtpu, which `pip install "jax[tpu]"` brings, is the whole compiler and needs no TPU.
"""

import importlib.util
import os
from typing import Any

from jax.experimental import topologies
from jax.sharding import Mesh

from jrope.errors import JropeError

# What libtpu would otherwise look for on the network, and does not find beside no TPU;
# and several processes that compile at once may each load it.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def can_describe() -> bool:
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def described(name: str) -> list[Any]:
    """The devices of a topology, such as "v5e:2x2", "v6e:4x4" or "v5p:2x2x1".

    Raises:
      JropeError: libtpu is not installed, or knows no such topology.
    """
    if not can_describe():
        raise JropeError(f'mesh: {name} needs libtpu; pip install "jax[tpu]"')
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    device, _, shape = name.partition(":")
    how: dict[str, Any] = {}
    if {*shape.split("x")} == {"1"}:  # less than the host that libtpu takes for granted
        how["chips_per_host_bounds"] = (1, 1, 1)
    if device == "v4":  # both cores of a chip are one device, as JAX has them
        how["chip_config_name"] = "megacore"
    try:
        return topologies.get_topology_desc(name, platform="tpu", **how).devices
    except RuntimeError as error:
        raise JropeError(f"mesh: libtpu knows no {name}: {error}") from None


def is_described(mesh: Any) -> bool:
    """Whether a mesh consists of such devices, which hold no arrays."""
    if not isinstance(mesh, Mesh) or mesh.empty:
        return False
    return mesh.devices.flat[0].client.runtime_type == "compile_only_runtime"
