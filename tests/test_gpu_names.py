"""The names of GPUs: every usual spelling means the right card, and what is no card is never taken for one."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptfit.errors import GptfitError
from gptfit.gpus import all_gpus, gpu_names, load_gpu
from gptfit.spelling import Spelling, letters_of
from gptfit.units import MiB

GPUS = all_gpus()
BY_NAME = {gpu.name: gpu for gpu in GPUS}

SPELLINGS = {
    "NVIDIA GeForce RTX 4070": "rtx4070",
    "GeForce RTX 4070": "rtx4070",
    "RTX 4070 12GB": "rtx4070",
    "RTX 4070 (12 GB)": "rtx4070",
    "4070": "rtx4070",
    "rtx-4070": "rtx4070",
    "rtx_4070": "rtx4070",
    "RTX4070": "rtx4070",
    "NVIDIA GeForce RTX 4070, 12282 MiB": "rtx4070",
    "NVIDIA GeForce RTX 4070 Ti": "rtx4070ti",
    "4070ti": "rtx4070ti",
    "NVIDIA GeForce RTX 4070 SUPER": "rtx4070s",
    "4070 super": "rtx4070s",
    "GeForce RTX 4070 Ti SUPER": "rtx4070tis",
    "4070 ti super": "rtx4070tis",
    "4070TiSuper": "rtx4070tis",
    "NVIDIA GeForce RTX 4070 Laptop GPU": "rtx4070-laptop",
    "rtx 4070 mobile": "rtx4070-laptop",
    "4090 laptop": "rtx4090-laptop",
    "3080 Ti Laptop GPU": "rtx3080ti-laptop",
    "RTX 3080 Laptop GPU 16GB": "rtx3080-laptop-16gb",
    "NVIDIA GeForce RTX 3050 6GB Laptop GPU": "rtx3050-laptop-6gb",
    "NVIDIA GeForce RTX 2070 with Max-Q Design": "rtx2070-laptop",
    "RTX 3060": "rtx3060",
    "RTX 3060 12GB": "rtx3060",
    "RTX 3060 8GB": "rtx3060-8gb",
    "3080": "rtx3080",
    "3080 12gb": "rtx3080-12gb",
    "4060 ti": "rtx4060ti",
    "4060 ti 16gb": "rtx4060ti-16gb",
    "RTX 4060 Ti 16 GB": "rtx4060ti-16gb",
    "5060ti-16gb": "rtx5060ti-16gb",
    "NVIDIA GeForce RTX 5090": "rtx5090",
    "RTX 4090 D": "rtx4090d",
    "gtx 1080 ti": "gtx1080ti",
    "1660 super": "gtx1660s",
    "NVIDIA GeForce GTX 1060 3GB": "gtx1060-3gb",
    "NVIDIA TITAN RTX": "titan-rtx",
    "Tesla T4": "t4",
    "Tesla V100-SXM2-16GB": "v100-16gb",
    "Tesla V100-PCIE-32GB": "v100-32gb-pcie",
    "Tesla P100-PCIE-16GB": "p100",
    "Quadro RTX 8000": "quadro-rtx8000",
    "Quadro RTX 6000": "quadro-rtx6000",
    "NVIDIA RTX 6000 Ada Generation": "rtx6000ada",
    "6000 Ada": "rtx6000ada",
    "RTX A6000": "rtxa6000",
    "A6000": "rtxa6000",
    "NVIDIA RTX A2000 12GB": "rtxa2000-12gb",
    "NVIDIA RTX A2000": "rtxa2000",
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": "rtxpro6000",
    "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition": "rtxpro6000-maxq",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": "rtxpro6000-server",
    "NVIDIA RTX PRO 6000 (96 GB)": "rtxpro6000",
    "NVIDIA A10": "a10",
    "NVIDIA A10G": "a10g",
    "NVIDIA L4": "l4",
    "NVIDIA L40": "l40",
    "NVIDIA L40S": "l40s",
    "A100-SXM4-80GB": "a100-80gb",
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "8x NVIDIA A100 SXM 80GB (DDP)": "a100-80gb",
    "NVIDIA A100 80GB PCIe": "a100-80gb-pcie",
    "A100-PCIE-40GB": "a100-40gb-pcie",
    "NVIDIA A800-SXM4-80GB": "a800-80gb",
    "H100 80GB HBM3": "h100-sxm",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H100 NVL": "h100-nvl",
    "H100": "h100-sxm",
    "NVIDIA H200 (143771 MiB)": "h200",
    "NVIDIA GH200 480GB": "gh200",
    "8x NVIDIA B200 (178.35 GiB)": "b200",
    "NVIDIA GB10 (DGX Spark, 128 GB unified)": "gb10",
    "AMD Instinct MI300X": "mi300x",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_usual_spelling_means_the_card(spelling):
    assert load_gpu(spelling).name == SPELLINGS[spelling]


@pytest.mark.parametrize("name", gpu_names())
def test_a_profile_is_found_by_its_own_name_and_title(name):
    assert load_gpu(name).name == name
    assert load_gpu(BY_NAME[name].title).name == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rtx4071", 'unknown GPU "rtx4071"; did you mean rtx4070, rtx4070s?'),
        ("", 'unknown GPU ""'),
        ("A100", '"A100" is more than one card: a100-40gb, a100-40gb-pcie, a100-80gb, a100-80gb-pcie'),
        ("NVIDIA A100 PCIe", '"NVIDIA A100 PCIe" is more than one card: a100-40gb-pcie, a100-80gb-pcie'),
        ("RTX 6000", '"RTX 6000" is more than one card: quadro-rtx6000, rtx6000ada'),
        ("RTX 4070 16GB", '"RTX 4070 16GB" has 11.99 GiB (rtx4070), not 16.00 GiB'),
        ("RTX 3080 16GB", '"RTX 3080 16GB" has 10.00 GiB (rtx3080) or 12.00 GiB (rtx3080-12gb), not 16.00 GiB'),
    ],
)
def test_a_name_that_is_no_card_says_why(name, message):
    with pytest.raises(GptfitError) as caught:
        load_gpu(name)
    assert caught.value.message == message
    assert caught.value.hint


@pytest.mark.parametrize(
    "name",
    [
        "RTX 2080 Ti Laptop GPU",
        "RTX 3090 Laptop",
        "NVIDIA GeForce RTX 2070 Super with Max-Q Design",
        "RTX 4060 SUPER",
        "RTX 3060 Ti SUPER",
        "RTX 4090 Ti",
        "RTX 5090 D",
        "RTX 4000 SFF Ada Generation",
        "NVIDIA A100 80GB PCIe MIG 1g.10gb",
        "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        "H100 80GB HBM3 MIG 1g.10gb",
        "GH200 144GB HBM3e",
        "RTX 40700",
        "AMD Radeon RX 7900 XTX",
        "RX 4070",
        "Apple M2 Ultra",
        "gpu",
        "x" * 5000,
        "\x00\n",
    ],
)
def test_a_card_without_a_profile_is_never_taken_for_a_neighbour(name):
    with pytest.raises(GptfitError) as caught:
        load_gpu(name)
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    ("name", "box_mib", "expected"),
    [
        ("NVIDIA GeForce RTX 3060", 12288, "rtx3060"),
        ("NVIDIA GeForce RTX 3060", 8192, "rtx3060-8gb"),
        ("NVIDIA GeForce RTX 4060 Ti", 16380, "rtx4060ti-16gb"),
        ("NVIDIA GeForce RTX 3080", 12288, "rtx3080-12gb"),
        ("NVIDIA GeForce RTX 3080 Laptop GPU", 16384, "rtx3080-laptop-16gb"),
        ("NVIDIA GeForce RTX 4070", 12282, "rtx4070"),
        ("A100", 40960, "a100-40gb"),
        ("A100 SXM", 81920, "a100-80gb"),
        ("NVIDIA H100", 97871, "h100-sxm-96gb"),
        ("NVIDIA L4", 23034, "l4"),
    ],
)
def test_the_driver_s_total_tells_variants_apart(name, box_mib, expected):
    assert load_gpu(name, box_bytes=box_mib * MiB).name == expected


ALIASES = [(alias, gpu.name) for gpu in GPUS for alias in (*gpu.aliases, gpu.name, gpu.title)]


@st.composite
def respelled(draw):
    """Any alias with other case, and other or no separators where it has one or goes from letter to digit."""
    alias, name = draw(st.sampled_from(ALIASES))
    parts = re.findall(r"[A-Za-z]+|[0-9]+|[^A-Za-z0-9 -]+|[ -]+", alias)
    text = ""
    for part in parts:
        if re.fullmatch(r"[ -]+", part):
            text += draw(st.sampled_from([" ", "-", "", "_", "  "]))
        else:
            text += "".join(draw(st.sampled_from([letter.lower(), letter.upper()])) for letter in part)
    return draw(st.sampled_from(["", " ", "NVIDIA ", "nvidia-"])) + text + draw(st.sampled_from(["", " "])), name


@settings(max_examples=200, deadline=None)
@given(respelled())
def test_case_and_separators_change_nothing(spelling):
    text, name = spelling
    assert load_gpu(text).name == name


def test_no_two_profiles_share_a_name():
    for key in (letters_of, Spelling.read):
        owners: dict[object, set[str]] = {}
        for alias, name in ALIASES:
            owners.setdefault(key(alias), set()).add(name)
        assert {key: names for key, names in owners.items() if len(names) > 1} == {}


@settings(deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_a_card_or_a_gptfit_error(text):
    try:
        assert load_gpu(text).name in BY_NAME
    except GptfitError as error:
        assert "\n" not in error.message
