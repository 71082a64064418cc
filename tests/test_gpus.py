"""GPU profiles: every number has a source, is possible, and is the published one where there is one."""

import re
import subprocess
import sys

import pytest

from gptfit.errors import GptfitError
from gptfit.gpus import PROFILES, all_gpus, gpu_names, read_profile
from gptfit.report.cards import gpus_json
from gptfit.units import GiB, MiB

GPUS = all_gpus()
BY_NAME = {gpu.name: gpu for gpu in GPUS}
EVERY_GPU = pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)

NUMBERS = [
    *("sm_count", "total_bytes", "driver_bytes", "context_bytes", "context_low_bytes", "context_high_bytes"),
    *("display_bytes", "flops", "bandwidth_bytes_per_second", "released"),
]

# PyTorch's figures on Linux, GiB, lowest and highest of published logs: none of these is the figure on the box.
SEEN_BY_TORCH = {
    "rtx4070": (11.56, 11.63),
    "rtx4070ti": (11.56, 11.73),
    "rtx3060": (11.62, 11.76),
    "rtx3090": (23.56, 23.70),
    "rtx4090": (23.49, 23.65),
    "rtx5090": (31.36, 31.37),
    "rtx3080": (9.68, 9.78),
    "rtx3070": (7.57, 7.78),
    "rtx2080ti": (10.57, 10.76),
    "rtx2060": (5.79, 5.79),
    "gtx1660ti": (5.81, 5.81),
    "rtx4060ti-16gb": (15.57, 15.57),
    "rtx5060ti-16gb": (15.44, 15.48),
    "rtx4050-laptop": (5.77, 5.77),
    "rtxa4000": (15.61, 15.61),
    "rtxa6000": (47.53, 47.54),
    "quadro-rtx8000": (47.46, 47.47),
    "rtx6000ada": (44.43, 47.51),
    "rtxpro6000": (94.97, 94.98),
    "l4": (21.95, 22.17),
    "l40": (44.40, 44.40),
    "l40s": (44.39, 44.53),
    "t4": (14.56, 14.76),
    "v100-16gb": (15.77, 15.78),
    "v100-32gb": (31.73, 31.75),
    "p100": (15.89, 15.90),
    "a10g": (21.99, 22.20),
    "a30": (23.50, 23.53),
    "a100-40gb": (39.39, 39.56),
    "a100-80gb": (79.14, 79.25),
    "h100-sxm": (79.18, 79.21),
    "h200": (139.72, 139.83),
    "b200": (178.35, 178.36),
    "gb200": (184.31, 187.28),
    "mi300x": (191.69, 191.98),
}

# What a headless card shows in nvidia-smi during compiled GPT-2 124M, less what the caching allocator holds, MiB.
REST_ON_HEADLESS_CARDS = {
    "rtx2000ada": (202,),
    "l4": (343, 325),
    "l40": (533,),
    "l40s": (575, 531),
    "rtxa4000": (259, 245),
    "rtxa4500": (271,),
    "rtxa5000": (314, 300),
    "rtxa6000": (242,),
    "a40": (343,),
    "a100-80gb": (529, 447),
    "h100-pcie": (709, 623),
    "h100-nvl": (640,),
    "h100-sxm": (792,),
    "h200": (592,),
    "rtxpro6000": (694,),
    "b200": (646,),
}

# Dense TFLOP/s with FP32 accumulation and GB/s, from NVIDIA's and AMD's papers: bf16 (fp16 where there is no bf16).
PUBLISHED = {
    "rtx4070": (58.3, 504.2),
    "rtx4090": (165.2, 1008),
    "rtx3090": (71, 936),
    "rtx3080": (59.5, 760),
    "rtx3070": (40.6, 448),
    "rtx3060": (25.5, 360),
    "rtx4080": (97.5, 716.8),
    "rtx5090": (209.5, 1792),
    "rtx5080": (112.6, 960),
    "rtx5070ti": (87.9, 896),
    "rtx2080ti": (53.8, 616),
    "titan-rtx": (130.5, 672),
    "rtxa6000": (154.8, 768),
    "rtxa5000": (111.1, 768),
    "rtxa4000": (76.7, 448),
    "rtx6000ada": (364.2, 960),
    "rtx4000ada": (106.9, 360),
    "rtxpro6000": (503.8, 1792),
    "a10": (125, 600),
    "a10g": (70, 600),
    "a30": (165, 933),
    "a40": (149.7, 696),
    "l4": (121, 300),
    "l40": (181, 864),
    "l40s": (362, 864),
    "t4": (65, 320),
    "v100-16gb": (125, 900),
    "v100-16gb-pcie": (112, 900),
    "a100-40gb": (312, 1555),
    "a100-80gb": (312, 2039),
    "a100-80gb-pcie": (312, 1935),
    "h100-pcie": (756, 2039),
    "h100-sxm": (989.4, 3352),
    "h100-nvl": (835.5, 3938),
    "h200": (989.4, 4800),
    "b200": (2250, 8000),
    "mi300x": (1307.4, 5300),
}


# ------------------------------------------------------------------------------------------- the numbers


def test_there_are_profiles_for_what_people_train_on():
    assert len(GPUS) >= 60
    assert [gpu.name for gpu in GPUS] == gpu_names() == sorted(gpu_names())


@EVERY_GPU
def test_every_number_has_a_source(gpu):
    optional = {"power_limit_watts"} if gpu.power_limit_watts is not None else set()
    assert set(gpu.sources) == {*NUMBERS, *optional}
    assert all(len(source) > 15 for source in gpu.sources.values())


def test_the_power_limit_is_that_of_the_card_as_shipped():
    # Published apart from the database that the profiles cite: launch reports, clouds, Hugging Face's hardware pages.
    published = {"rtx3090": 350, "rtx4090": 450, "t4": 70, "a100-40gb": 400, "h100-sxm": 700, "h100-pcie": 350}
    assert {name: BY_NAME[name].power_limit_watts for name in published} == published
    assert all(gpu.power_limit_watts is None for gpu in GPUS if gpu.name.endswith("laptop"))


@EVERY_GPU
def test_memory_is_possible(gpu):
    assert gpu.total_bytes < gpu.box_bytes or gpu.name == "k80"
    assert gpu.driver_bytes < 0.07 * gpu.box_bytes
    assert gpu.context_low_bytes <= gpu.context_bytes <= gpu.context_high_bytes
    assert 70 * MiB <= gpu.context_bytes <= 1.1 * GiB
    assert gpu.display_bytes < 0.35 * gpu.total_bytes
    # The figure on the box is a whole number of GiB, and more than PyTorch sees.
    nominal = [int(size) for alias in gpu.aliases for size in re.findall(r"([0-9]+)GB", alias)]
    assert not nominal or gpu.total_bytes < max(nominal) * GiB


@pytest.mark.parametrize("name", SEEN_BY_TORCH)
def test_total_is_what_torch_shows(name):
    low, high = SEEN_BY_TORCH[name]
    assert low - 0.005 <= BY_NAME[name].total_bytes / GiB <= high + 0.005


@pytest.mark.parametrize("name", REST_ON_HEADLESS_CARDS)
def test_context_is_what_a_headless_card_leaves(name):
    gpu, rests = BY_NAME[name], REST_ON_HEADLESS_CARDS[name]
    assert all(gpu.context_low_bytes <= rest * MiB <= gpu.context_high_bytes for rest in rests)
    assert abs(gpu.context_bytes - sum(rests) / len(rests) * MiB) <= 100 * MiB


@pytest.mark.parametrize("name", PUBLISHED)
def test_flops_and_bandwidth_are_the_published_ones(name):
    gpu, (tera, giga) = BY_NAME[name], PUBLISHED[name]
    assert (gpu.flops.bf16 or gpu.flops.fp16) == pytest.approx(tera * 1e12, rel=0.01)
    assert gpu.bandwidth_bytes_per_second == pytest.approx(giga * 1e9, rel=0.01)


# FLOP a clock and SM: FP16 on tensor cores with FP32 accumulation (fast and, on cards for games, half of it), FP32.
RATES = {
    "kepler": (None, 384),
    "maxwell": (None, 256),
    "pascal": (None, 256),
    "volta": (1024, 128),
    "turing": (1024, 128),
    "ampere": (1024, 256),
    "ada": (1024, 256),
    "hopper": (4096, 256),
    "blackwell": (1024, 256),
    "cdna3": (2048, 256),
}
# The large chips of a generation are other chips.
LARGE_CHIP_RATES = {"6.0": (None, 128), "8.0": (2048, 128), "10.0": (8192, 256)}


@EVERY_GPU
def test_flops_are_within_sms_times_clock(gpu):
    tensor, plain = LARGE_CHIP_RATES.get(gpu.compute_capability, RATES[gpu.architecture])
    assert 0.8e9 < gpu.flops.fp32 / (gpu.sm_count * plain) < 2.7e9
    assert (gpu.flops.fp16 is None) == (tensor is None or gpu.title.startswith("NVIDIA GeForce GTX"))
    if gpu.flops.fp16 is not None and tensor is not None:
        clock = gpu.flops.fp16 / (gpu.sm_count * tensor)
        assert 0.5 * 1.2e9 < clock < 2.7e9
        # A card for games accumulates in FP32 at half the rate of the same chip on a workstation card.
        if "GeForce" in gpu.title:
            assert clock < 0.5 * 2.7e9


@EVERY_GPU
def test_dtypes_are_those_of_the_architecture(gpu):
    flops = gpu.flops
    has_bf16 = float(gpu.compute_capability) >= 8.0
    assert (flops.bf16 is not None, flops.tf32 is not None) == (has_bf16, has_bf16)
    if has_bf16:
        assert flops.bf16 == flops.fp16
        assert flops.tf32 == pytest.approx(flops.bf16 / 2, rel=0.001)
        assert flops.fp32 <= flops.tf32 * 1.001


@EVERY_GPU
def test_bandwidth_is_of_the_memory_s_kind(gpu):
    per_gib = gpu.bandwidth_bytes_per_second / (gpu.box_bytes / GiB) / 1e9
    assert (2 if gpu.name == "gb10" else 6) < per_gib < 110
    assert gpu.flops.fp32 / gpu.bandwidth_bytes_per_second < 120


def test_a_generation_grows_with_its_sms():
    for architecture in ("ampere", "ada"):
        cards = sorted((g for g in GPUS if g.architecture == architecture), key=lambda gpu: gpu.sm_count)
        smallest, largest = cards[0], cards[-1]
        assert smallest.context_bytes < largest.context_bytes


# ------------------------------------------------------------------------------------------- the files


def without_block(text: str, key: str) -> str:
    return re.sub(rf"(?m)^{key}:\n(?:  .*\n)+", "", text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("value: 46\n  source:", "value: 46\n  remark:"), "sm_count has no source"),
        (lambda text: text + "\nwatts: 200\n", "watts has no source"),
        (lambda text: text + "\nwatts:\n  value: 200\n  source: data sheet\n", "watts: Extra inputs are not permitted"),
        (lambda text: without_block(text, "flops"), "flops: Field required"),
        (lambda text: text.replace("11.58 GiB", "12 GB"), 'unknown unit "GB"'),
        (lambda text: text.replace("11.58 GiB", "-1"), "negative"),
        (lambda text: text.replace("11.58 GiB", "[1, 2]"), "cannot read the size"),
        (lambda text: text.replace("bf16: 5.829e+13", "bf16: .inf"), "flops.bf16"),
        (lambda text: text.replace('"8.9"', "8.9"), "compute_capability has no source"),
        (lambda text: "- a list\n", "is not a profile"),
        (lambda text: text + "\n}\n", "is not YAML"),
        (lambda text: text.replace("architecture: ada", "architecture: adda"), "architecture"),
    ],
)
def test_a_broken_profile_is_refused_with_its_place(tmp_path, change, message):
    text = (PROFILES / "rtx4070.yaml").read_text(encoding="utf-8")
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    assert read_profile(path) == BY_NAME["rtx4070"]
    broken = change(text)
    assert broken != text
    path.write_text(broken, encoding="utf-8")
    with pytest.raises(GptfitError, match=re.escape(message)) as caught:
        read_profile(path)
    assert caught.value.message.startswith("mine.yaml")


def test_one_card_costs_one_file_and_no_heavy_import():
    """In a fresh interpreter: what is imported, and which files are opened for a name of each kind."""
    program = """
import sys
opened = []
sys.addaudithook(lambda event, args: event == "open" and "profiles" in str(args[0]) and opened.append(str(args[0])))
from gptfit.gpus import load_gpu
assert not {"torch", "numpy", "tiktoken", "yaml"} & set(sys.modules), "imported too early"
for name in ("rtx4070", "NVIDIA GeForce RTX 3090", "NVIDIA A100-SXM4-80GB", "4060 ti 16gb"):
    load_gpu(name)
assert not {"torch", "numpy", "tiktoken"} & set(sys.modules)
print(len(opened))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "4"


def test_what_ends_in_bytes_is_bytes_in_the_record_too() -> None:
    """Sources are text: each is called as its figure is, without the unit."""

    def pairs(value: object) -> list[tuple[str, object]]:
        if isinstance(value, dict):
            return [pair for key, inner in value.items() for pair in [(key, inner), *pairs(inner)]]
        return [pair for inner in value for pair in pairs(inner)] if isinstance(value, list) else []

    record = gpus_json(GPUS)
    sizes = [value for key, value in pairs(record) if key.endswith("_bytes")]
    assert len(sizes) >= 5 * len(GPUS) and all(type(value) is int for value in sizes)
    (first, *_) = [card for card in record["gpus"] if card["name"] == "rtx4070"]
    assert first["sources"]["total"] == BY_NAME["rtx4070"].sources["total_bytes"]
