"""What a device computes at most, from the makers' data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass

from launcher.run.hardware import Precision

_HOPPER = "https://www.nvidia.com/en-us/data-center/h100/"
_HGX = "https://www.nvidia.com/en-us/data-center/hgx/"
_AMPERE = "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.1.pdf"
_ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
_VOLTA = "https://www.nvidia.com/en-us/data-center/v100/"


@dataclass(frozen=True, kw_only=True)
class DevicePeak:
    """TFLOP/s of dense matrix products with float32 accumulation; sheets often print those with sparsity,
    twice as many."""

    name: str
    """Pattern of torch's device name without the maker's; a laptop's or a partition's name is longer."""
    bf16: float | None
    tf32: float | None
    fp32: float
    source: str


DEVICE_PEAKS = (
    DevicePeak(name="B[23]00", bf16=2250, tf32=1125, fp32=75, source=_HGX),
    DevicePeak(
        name="GH200 .*|H200|H100 (80|96)GB HBM3|H100 SXM.*", bf16=989.4, tf32=494.7, fp32=66.9, source=_HOPPER
    ),
    DevicePeak(name="H[12]00 NVL", bf16=835.5, tf32=417.5, fp32=60, source=_HOPPER),
    DevicePeak(name="H100 PCIe", bf16=756, tf32=378, fp32=51, source=_HOPPER),
    DevicePeak(
        name="A100.SXM4.(40|80)GB|A100.PCIE.(40|80)GB|A100 80GB PCIe",
        bf16=312,
        tf32=156,
        fp32=19.5,
        source="https://www.nvidia.com/en-us/data-center/a100/",
    ),
    DevicePeak(
        name="L40S", bf16=362, tf32=183, fp32=91.6, source="https://www.nvidia.com/en-us/data-center/l40s/"
    ),
    DevicePeak(
        name="L40", bf16=181, tf32=90.5, fp32=90.5, source="https://www.nvidia.com/en-us/data-center/l40/"
    ),
    DevicePeak(
        name="L4", bf16=121, tf32=60, fp32=30.3, source="https://www.nvidia.com/en-us/data-center/l4/"
    ),
    DevicePeak(
        name="A40", bf16=149.7, tf32=74.8, fp32=37.4, source="https://www.nvidia.com/en-us/data-center/a40/"
    ),
    DevicePeak(name="RTX A6000", bf16=154.8, tf32=77.4, fp32=38.7, source=_AMPERE),
    DevicePeak(name="GeForce RTX 3090", bf16=71, tf32=35.6, fp32=35.6, source=_AMPERE),
    DevicePeak(name="GeForce RTX 4090", bf16=165.2, tf32=82.6, fp32=82.6, source=_ADA),
    DevicePeak(name="V100-SXM2-(16|32)GB", bf16=None, tf32=None, fp32=15.7, source=_VOLTA),
    DevicePeak(name="V100-PCIE-(16|32)GB", bf16=None, tf32=None, fp32=14, source=_VOLTA),
)


def peak_flops(device_name: str, precision: Precision, *, allows_tf32: bool) -> float | None:
    """FLOP/s of one device at most; None for one that is not in the table.

    device_name: `torch.cuda.get_device_name()`. allows_tf32: whether torch may round float32 products to TF32
    (`torch.get_float32_matmul_precision()` other than "highest").
    """
    name = re.sub(r"^(NVIDIA|Tesla) ", "", device_name)
    for device in DEVICE_PEAKS:
        if re.fullmatch(device.name, name):
            if precision != "fp32":
                peak = device.bf16
            else:
                peak = device.tf32 if allows_tf32 and device.tf32 else device.fp32
            return peak * 1e12 if peak else None
    return None
