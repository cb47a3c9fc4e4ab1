"""What a user may say, what vLLM is told in turn, and the sentence for everything else."""

import pytest

from prefixstore.errors import InvalidError
from prefixstore.vllm.options import MachineMemory, TierOptions, check_options, expand
from prefixstore.vllm.serve import main, transfer_config

MEMORY = MachineMemory(total_bytes=64 * 2**30, shared_bytes=32 * 2**30)


def test_one_option_is_enough():
    """A root expands into everything that vLLM needs to know."""
    expanded = expand({"root": "/kv"}, machine=MEMORY)

    assert "PrefixStoreSpec" == expanded["spec_name"]
    assert "prefixstore.vllm.spec" == expanded["spec_module_path"]
    assert 4 * 2**30 == expanded["cpu_bytes_to_use"]
    (tier,) = expanded["secondary_tiers"]
    assert ("PrefixStoreTier", "/kv") == (tier["type"], tier["root"])


def test_options_of_vllm_pass_through():
    """What vLLM has an option for keeps vLLM's name and reaches vLLM."""
    expanded = expand(
        {"root": "/kv", "blocks_per_chunk": 4, "cpu_bytes_to_use": 10**9, "codec": "zstd"},
        machine=MEMORY,
    )

    assert (4, 10**9) == (expanded["blocks_per_chunk"], expanded["cpu_bytes_to_use"])
    assert "zstd" == expanded["secondary_tiers"][0]["codec"]
    assert "blocks_per_chunk" not in expanded["secondary_tiers"][0]


def test_expanding_twice_changes_nothing():
    """Both roles of an engine may share one config object."""
    once = expand({"root": "/kv"}, machine=MEMORY)

    assert once == expand(once, machine=MEMORY)


def test_the_cpu_tier_fits_a_small_machine():
    """In a container with 64 MB of /dev/shm the tier takes half of it."""
    small = MachineMemory(total_bytes=8 * 2**30, shared_bytes=64 * 2**20)

    assert 32 * 2**20 == expand({"root": "/kv"}, machine=small)["cpu_bytes_to_use"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "needs a root"),
        ({"root": ""}, "needs a root"),
        ({"root": "/kv", "durabilty": "data"}, "unknown field `durabilty`. Known options: "),
        ({"root": "/kv", "max_bytes": "much"}, r"Expected `int \| null`, got `str` - at `\$.max_b"),
        ({"root": "/kv", "max_bytes": 0}, "Expected `int` >= 1"),
        ({"root": "/kv", "codec": "lz4"}, "Invalid enum value 'lz4'"),
        ({"root": "/kv", "load_threads": 1000}, "Expected `int` <= 64"),
        ({"root": "/kv", "load_deadline_s": 0}, "Expected `float` > 0"),
        ({"root": "/kv", "namespace": "mine"}, "works it out from the model"),
    ],
)
def test_a_wrong_option_is_refused_by_name(options, sentence):
    """VLLM would ignore it in silence; here one sentence says what is wrong."""
    with pytest.raises(InvalidError, match=sentence):
        check_options(options)


def test_staging_memory_stays_within_its_limit_but_never_below_the_threads():
    """Large chunks get few buffers, small ones many, and each thread has one."""
    options = TierOptions.from_mapping(
        {"root": "/kv", "buffers_bytes": 64 * 2**20, "load_threads": 4, "store_threads": 2}
    )

    assert 64 == options.limits(2**16).buffer_count
    assert 16 == options.limits(4 * 2**20).buffer_count
    assert 6 == options.limits(512 * 2**20).buffer_count


def test_serve_checks_before_it_starts_anything():
    """A misspelt option costs a moment, not a model's loading time."""
    with pytest.raises(InvalidError, match="bogus"):
        main(["model", '{"root": "/kv", "bogus": 1}'])


@pytest.mark.parametrize(
    "given",
    [
        ["--kv-transfer-config", "{}"],
        ["--kv-transfer-config={}"],
        ["--kv_transfer_config", "{}"],
        ["--kv_transfer_config={}"],
        ["--kv-transfer-config.kv_role", "kv_both"],
        ["--kv-transfer", "{}"],
    ],
)
def test_serve_refuses_a_second_connector_however_it_is_spelt(given: list[str]) -> None:
    """Of two values vLLM takes the last, and prefixstore would silently be gone."""
    with pytest.raises(InvalidError, match="--kv-transfer-config"):
        main(["model", '{"root": "/kv"}', *given])


def test_serve_hands_vllm_the_front_door():
    """The value of --kv-transfer-config is the one that the documents show."""
    config = transfer_config({"root": "/kv"})

    assert '"kv_connector":"PrefixStoreConnector"' in config
    assert '"kv_connector_extra_config":{"root":"/kv"}' in config


def test_the_direct_path_has_no_cpu_tier():
    """What would do nothing there is refused by name; what means something passes."""
    direct = {"root": "/kv", "mode": "direct", "blocks_per_chunk": 2, "offload_prompt_only": True}

    assert "direct" == check_options(direct).mode
    with pytest.raises(InvalidError, match=r"mode=direct has no CPU tier, so cpu_bytes_to_use"):
        check_options({**direct, "cpu_bytes_to_use": 10**9})
    with pytest.raises(InvalidError, match=r"mode=direct has no CPU tier, so locality"):
        check_options({**direct, "locality": "LOCAL"})


def test_another_mode_is_refused():
    """A misspelt mode is no tier."""
    with pytest.raises(InvalidError, match="mode"):
        check_options({"root": "/kv", "mode": "Direct"})
