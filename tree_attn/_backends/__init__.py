"""The built-in backends, one file each, registered best first."""

from tree_attn import registry
from tree_attn._backends.cuda import CudaBackend
from tree_attn._backends.flex import FlexBackend
from tree_attn._backends.reference import ReferenceBackend
from tree_attn._backends.sdpa import SdpaBackend

for _backend in (CudaBackend(), FlexBackend(), SdpaBackend(), ReferenceBackend()):
    registry.register_backend(_backend)
