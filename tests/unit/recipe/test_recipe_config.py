"""Recipes: what is accepted, and what a person is told when something is not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gs_dist.errors import RecipeError
from gs_dist.numbers.table import WEIGHT_FORMATS
from gs_dist.recipe.config import CalibrationConfig, load_recipe, published_recipe, recipe_fingerprint
from gs_dist.recipe.policy import OutliersSuppressionType
from gs_dist.recipe.sizes import parse_size

RECIPE = r"""
model: /models/Meta-Llama-3-70B
output: /runs/llama3-70b-w8a8
calibration: {data: /data/calib/*.parquet, num_samples: 512, sequence_length: 2048}
ptq: {weight_quant_dtype: int8, act_quant_dtype: int8, outliers_suppression: smooth, opname_blacklist: [lm_head]}
layer_policies:
  '.*mlp\.down_proj': {act_quant_granularity: per_token, algo_args: {alpha: 0.7}}
  '.*o_proj': null
parallel: {pipeline_parallel_size: 8, data_parallel_size: 2, memory_per_worker: 60GiB}
format: [compressed-tensors]
"""
MINIMAL = "model: m\noutput: o\ncalibration: {data: d.parquet}\n"


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_recipe(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_recipe


def refusal(path: Path, *overrides: str) -> list[str]:
    """The problems a recipe is refused with, one a line."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    head, *lines = str(caught.value).splitlines()
    assert head.startswith("recipe recipe.yaml has ")
    return [line.strip() for line in lines]


def test_the_documented_recipe_is_read(write: Any) -> None:
    """Sizes, lists, partial layer policies and null policies come out as written."""
    config = load_recipe(write(RECIPE))
    assert config.parallel.memory_per_worker == 60 * 2**30
    assert config.calibration.data == ("/data/calib/*.parquet",)
    assert config.network_policy.outliers_suppression is OutliersSuppressionType.SMOOTH
    policies = config.resolved_layer_policies
    assert policies[".*o_proj"] is None
    down = policies[r".*mlp\.down_proj"]
    assert down is not None
    assert (down.act_quant_granularity, down.act_quant_dtype, down.algo_args.alpha) == ("per_token", "int8", 0.7)
    assert config.network_policy.algo_args.alpha is None


def test_algo_args_are_laid_over_key_by_key(write: Any) -> None:
    """A layer policy that sets one algorithm argument keeps the others of ptq."""
    gptq = "weight_quant_dtype: qint4x2, outliers_suppression: smooth, precision_recovery: gptq"
    text = MINIMAL + f"ptq: {{{gptq}, algo_args: {{alpha: 0.6, damp_percent: 0.1}}}}\n"
    policy = load_recipe(write(text + "layer_policies: {q: {algo_args: {alpha: 0.9}}}")).resolved_layer_policies["q"]
    assert policy is not None
    assert (policy.algo_args.alpha, policy.algo_args.damp_percent) == (0.9, 0.1)


@pytest.mark.parametrize(
    ("argument", "turns_on"),
    [
        ("alpha: 0.9", "outliers_suppression: smooth"),
        ("smooth_alpha: 0.3", "outliers_suppression: awq"),
        ("duo_scaling: false", "outliers_suppression: awq"),
        ("weight_clip_ratio: [0.5]", "weight_clip: true"),
        ("desc_act: true", "precision_recovery: gptq"),
        ("damp_percent: 0.2", "precision_recovery: gptq"),
    ],
)
def test_an_argument_of_an_algorithm_that_is_off_is_refused(write: Any, argument: str, turns_on: str) -> None:
    """Plain rounding in place of the algorithm that somebody tuned would be silent otherwise."""
    name = argument.split(":")[0]
    with pytest.raises(RecipeError, match=rf"ptq\.algo_args\.{name} is set and nothing reads it: set {turns_on}"):
        load_recipe(write(MINIMAL + f"ptq: {{weight_quant_dtype: int8, algo_args: {{{argument}}}}}"))
    layered = MINIMAL + f"layer_policies: {{'.*up': {{algo_args: {{{argument}}}}}}}"
    with pytest.raises(RecipeError, match=rf"layer_policies\..*\.algo_args\.{name} is set.*set {turns_on}"):
        load_recipe(write(layered))


def test_an_argument_that_one_layer_policy_reads_is_not_refused(write: Any) -> None:
    """An argument of ptq may be meant for the layers whose policy turns its algorithm on, or off."""
    for first, second in (("none", "smooth"), ("smooth", "none")):
        ptq = f"ptq: {{act_quant_dtype: int8, outliers_suppression: {first}, algo_args: {{alpha: 0.3}}}}\n"
        load_recipe(write(MINIMAL + ptq + f"layer_policies: {{'.*up': {{outliers_suppression: {second}}}}}"))


def test_a_minimal_recipe_leaves_sizes_to_the_plan(write: Any) -> None:
    """Every size defaults to auto."""
    parallel = load_recipe(write(MINIMAL)).parallel
    assert {parallel.pipeline_parallel_size, parallel.data_parallel_size, parallel.memory_per_worker} == {"auto"}


def test_all_problems_are_told_at_once(write: Any) -> None:
    """One run names every unknown key, wrong type and contradiction, by path."""
    problems = refusal(
        write(
            "modle: /m\noutput: /o\n"
            "calibration: {data: [], num_sample: 512, sequence_length: 20.5, seed: true, reduction_blocks: 6}\n"
            "ptq: {weight_quant_dtype: int9, opname_blacklist: lm_head, algo_args: {alpha: 3}}\n"
            "layer_policies: {'.*(o': null, a: 3, b: {act_quant_granularit: per_token, group_size: x}}\n"
            "parallel: {pipeline_parallel_size: 0, memory_per_worker: 60Gb, timeout: .inf}\n"
            "format: [compressed-tensor]\ngram: maybe\n1: 2\n"
        )
    )
    *others, last = WEIGHT_FORMATS
    expected = {
        "model: missing; this key is required",
        "modle: found an unknown key; write model if that is meant",
        "calibration.data: found []; write a text, or a list of texts",
        "calibration.num_sample: found an unknown key; write num_samples if that is meant",
        "calibration.sequence_length: found 20.5; write a whole number",
        "calibration.seed: found True; write a whole number",
        "calibration.reduction_blocks: found 6; write a power of two: 1, 2, 4, 8, 16 ...",
        f"ptq.weight_quant_dtype: found 'int9'; write {', '.join(others)} or {last}, or null",
        "ptq.opname_blacklist: found 'lm_head'; write a list of parts of names, such as [lm_head]",
        "ptq.algo_args.alpha: found 3; write at most 1.0, or a list",
        "layer_policies.'.*(o': found '.*(o'; write a regular expression: it does not compile "
        "(missing ), unterminated subpattern at position 2)",
        "layer_policies.a: found 3; write a table of options to lay over ptq, or null to leave the linears alone",
        "layer_policies.b.act_quant_granularit: found an unknown key; write act_quant_granularity if that is meant",
        "layer_policies.b.group_size: found 'x'; write a whole number",
        "parallel.pipeline_parallel_size: found 0; write auto, or a whole number from 1",
        "parallel.memory_per_worker: found '60Gb'; write auto, or a size such as 60GiB, 512MiB or 8GB",
        "parallel.timeout: found inf; write a finite number",
        "format: found ['compressed-tensor']; write one or more of compressed-tensors, ascend, golden-stick, gptq, "
        "each once",
        "gram: found 'maybe'; write auto, on or off",
        "1: found a key that is not text; write the key in quotes",
    }
    assert set(problems) == expected


@pytest.mark.parametrize(
    ("ptq", "message"),
    [
        (
            "{act_quant_dtype: int8, weight_quant_granularity: per_group, group_size: 64}",
            "ptq: W8A8 takes weights per channel: set weight_quant_granularity: per_channel, or act_quant_dtype: null",
        ),
        (
            "{weight_quant_dtype: null, act_quant_dtype: int8}",
            "ptq: act_quant_dtype is int8 while weight_quant_dtype is null: set weight_quant_dtype: int8",
        ),
        (
            "{weight_quant_dtype: qint4x2, weight_quant_granularity: per_group, group_size: 32}",
            "ptq: group_size is 32 while weight_quant_granularity is per_group: set group_size: 64, 128 or 256",
        ),
    ],
)
def test_contradictions_name_the_section(write: Any, ptq: str, message: str) -> None:
    """Settings that exclude each other are refused where they stand."""
    assert message in refusal(write(MINIMAL + f"ptq: {ptq}"))


def test_a_contradiction_between_ptq_and_a_layer_policy_is_told_under_the_policy(write: Any) -> None:
    """A merged policy is validated as a whole."""
    text = MINIMAL + "ptq: {act_quant_dtype: int8}\nlayer_policies: {'.*q_proj': {precision_recovery: gptq}}"
    assert refusal(write(text)) == ["layer_policies.'.*q_proj': GPTQ does not serve W8A8: set precision_recovery: none"]


def test_output_must_not_lie_in_the_model_directory(write: Any) -> None:
    """Nothing is ever written into the source checkpoint."""
    text = MINIMAL.replace("output: o", "output: ./m/../m/out")
    assert refusal(write(text)) == ["output: found './m/../m/out'; write a directory of its own, outside the model's"]


def test_bad_yaml_gives_line_and_column(write: Any) -> None:
    """A syntax error says where."""
    assert refusal(write("model: m\noutput: [o\n")) == [
        "line 3, column 1: not YAML (expected ',' or ']', but got '<stream end>')"
    ]


@pytest.mark.parametrize(
    ("value", "told"), [("!local x", "!local"), ("!!python/name:os.system x", "!!python/name:os.sy")]
)
def test_a_tag_is_refused_by_its_name(write: Any, value: str, told: str) -> None:
    """Nothing is constructed, and the message says what to do."""
    (problem,) = refusal(write(f"model: {value}\noutput: o\n"))
    assert problem.startswith(f"line 1, column 8: the tag {told}")
    assert problem.endswith(" means nothing in a recipe; leave it out, or put the text in quotes")


def test_a_key_given_twice_is_refused(write: Any) -> None:
    """YAML would silently keep the last one."""
    assert refusal(write(MINIMAL + "gram: off\nmodel: other\n")) == [
        "line 5, column 1: key 'model' stands twice, first in line 1; keep one of the two"
    ]


@pytest.mark.parametrize("text", ["- model\n", "just text\n", "3\n"])
def test_a_document_that_is_no_table_is_refused(write: Any, text: str) -> None:
    """A list, a text or a number is no recipe."""
    (problem,) = refusal(write(text))
    assert problem.endswith("at the top; write keys such as 'model: PATH', one a line")


def test_an_alias_bomb_is_refused(write: Any) -> None:
    """A page of aliases that stands for millions of values ends in a message."""
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    assert "write the recipe flat" in refusal(write("\n".join(levels)))[0]


def test_a_missing_and_a_binary_file_are_refused(tmp_path: Path) -> None:
    """What cannot be read as text is named, with what to do."""
    with pytest.raises(RecipeError, match=r"cannot be read: No such file or directory; name a YAML file"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"binary.yaml is not UTF-8 text \(byte 0\)"):
        load_recipe(tmp_path / "binary.yaml")
    with pytest.raises(RecipeError, match="Is a directory"):
        load_recipe(tmp_path)


def test_yaml_switches_and_exponents_are_read_as_meant(write: Any) -> None:
    """A bare off and 1e-2 mean what they say."""
    config = load_recipe(write(MINIMAL + "gram: off\nmax_relative_error: 1e-2\n"))
    assert (config.gram, config.takes_gram, config.max_relative_error) == ("off", False, 0.01)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("max_perplexity_increase=-0.1", "max_perplexity_increase: found -0.1; write at least 0.0"),
        ("max_perplexity_increase=5%", "max_perplexity_increase: found '5%'; write a number"),
        ("max_perplexity_increase=.inf", "max_perplexity_increase: found inf; write a finite number"),
        ("probe.num_samples=0", "probe.num_samples: found 0; write at least 1"),
        ("probe.max_new_tokens=-1", "probe.max_new_tokens: found -1; write at least 0"),
        ("probe.max_new_tokens=no", "probe.max_new_tokens: found False; write a whole number"),
        ("probe.data=[]", "probe.data: found []; write a text, a list of texts, or null for the calibration data"),
        ("probe.samples=4", "probe.samples: found an unknown key; write num_samples if that is meant"),
    ],
)
def test_a_probe_that_cannot_be_meant_is_refused(write: Any, override: str, problem: str) -> None:
    """Shares, counts and data of the probe are as strict as the rest."""
    assert problem in refusal(write(MINIMAL + "max_perplexity_increase: 0.05\n"), override)


def test_a_probe_without_a_limit_is_refused(write: Any) -> None:
    """Settings of a probe that does not happen would be forgotten in silence."""
    (problem,) = refusal(write(MINIMAL), "probe.num_samples=4")
    assert problem.startswith("probe is set while max_perplexity_increase is null, so that nothing is probed: set ")


def test_the_probe_takes_the_calibration_data_unless_it_has_its_own(write: Any) -> None:
    """Never more samples than the calibration has of the same data, and no larger micro-batches."""
    config = load_recipe(write(MINIMAL), ["max_perplexity_increase=0.05", "calibration.sequence_length=512"])
    data = config.probe_data
    assert (data.data, data.num_samples, data.samples_per_micro_batch) == (("d.parquet",), 8, 4)
    few = load_recipe(write(MINIMAL), ["max_perplexity_increase=0.05", "calibration.num_samples=3"])
    assert (few.probe_data.num_samples, few.probe_data.samples_per_micro_batch) == (3, 1)
    own = load_recipe(
        write(MINIMAL), ["max_perplexity_increase=0", "calibration.num_samples=3", "probe.data=/x/e.parquet"]
    )
    assert (own.probe_data.data, own.probe_data.num_samples) == (("/x/e.parquet",), 8)
    assert yaml.safe_load(published_recipe(own))["probe"]["data"] == ["e.parquet"]
    relative = load_recipe(write(MINIMAL), ["max_perplexity_increase=0", "probe.data=[e.parquet, 's3://b/e']"])
    assert relative.anchored().probe.data == (str(Path("e.parquet").absolute()), "s3://b/e")


def test_overrides_are_laid_over_the_recipe_in_order(write: Any) -> None:
    """Values are YAML; keys with dots stand in quotes; the last one wins."""
    config = load_recipe(
        write(RECIPE),
        [
            "calibration.num_samples=64",
            "calibration.num_samples=32",
            r"layer_policies.'.*mlp\.down_proj'.act_quant_granularity=per_tensor",
            r'layer_policies.".*gate_proj"=null',
            "format=[compressed-tensors, ascend]",
            "gram=off",
        ],
    )
    assert config.calibration.num_samples == 32
    down = config.resolved_layer_policies[r".*mlp\.down_proj"]
    assert down is not None
    assert (down.act_quant_granularity, down.algo_args.alpha) == ("per_tensor", 0.7)
    assert config.layer_policies[".*gate_proj"] is None
    assert config.dialects == ("compressed-tensors", "ascend")
    assert not config.takes_gram


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("num_samples", "override 'num_samples': cannot be read; write key.path=value"),
        (
            "calibration.num_sampels=3",
            "calibration.num_sampels: found an unknown key; write num_samples if that is meant",
        ),
        (
            "calibration.data.x=3",
            "calibration.data.x: found 'd.parquet', which has no keys; write the whole value of data",
        ),
        (
            "gram=[",
            "override 'gram': cannot be read; line 1, column 2: not YAML (expected the node content, but "
            "found '<stream end>')",
        ),
        (
            "layer_policies..*q.group_size=64",
            "override 'layer_policies..*q.group_size': cannot be read; write "
            r"key.path=value, with a key that holds dots in quotes: layer_policies.'.*mlp\.down_proj'.group_size=64",
        ),
    ],
)
def test_a_bad_override_is_named(write: Any, override: str, message: str) -> None:
    """An override that cannot be read or applied is told like any other problem."""
    assert message in refusal(write(MINIMAL), override)


def test_int4_is_another_word_for_qint4x2(write: Any) -> None:
    """The usual word is taken, also in layer policies, and makes the same recipe."""
    text = MINIMAL + "ptq: {weight_quant_dtype: %s}\nlayer_policies: {'.*q_proj': {weight_quant_dtype: %s}}\n"
    usual, theirs = (load_recipe(write(text % (word, word))) for word in ("int4", "qint4x2"))
    assert usual.ptq.weight_quant_dtype == "qint4x2"
    assert usual.resolved_layer_policies == theirs.resolved_layer_policies
    assert usual.fingerprint_fields() == theirs.fingerprint_fields()


def test_overrides_do_not_leak_through_yaml_aliases(write: Any) -> None:
    """Changing one place of a shared node leaves the other place alone."""
    text = MINIMAL + "layer_policies: {a: &p {group_size: 0}, b: *p}\n"
    config = load_recipe(write(text), ["layer_policies.a.weight_quant_dtype=qint4x2"])
    assert config.layer_policies["b"] == {"group_size": 0}


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("60GiB", 60 * 2**30),
        ("512MiB", 2**29),
        ("8GB", 8 * 10**9),
        ("1.5 KiB", 1536),
        (7, 7),
        ("3B", 3),
        ("2TB", 2e12),
        ("60Gi", 60 * 2**30),
        ("512Mi", 2**29),
        ("8G", 8 * 10**9),
    ],
)
def test_sizes(written: Any, size: float) -> None:
    """Binary and decimal units, with a B or as Kubernetes writes them, and plain numbers."""
    assert parse_size(written) == size


@pytest.mark.parametrize("written", ["60", "60gib", "", "-1GiB", "0GiB", 0, -3, True, 1.5, None, "9" * 400 + "GiB"])
def test_what_is_no_size_is_refused(written: Any) -> None:
    """Guessing a unit would be a factor of a thousand wrong."""
    with pytest.raises(ValueError, match="write a size such as 60GiB"):
        parse_size(written)


@pytest.mark.parametrize(("length", "samples", "expected"), [(512, 128, 4), (2048, 128, 1), (8192, 128, 1), (16, 5, 5)])
def test_the_micro_batch_follows_from_the_data_alone(write: Any, length: int, samples: int, expected: int) -> None:
    """About 2048 tokens, at least one sample, at most all of them."""
    overrides = [f"calibration.sequence_length={length}", f"calibration.num_samples={samples}"]
    data = load_recipe(write(MINIMAL), overrides).calibration
    assert data.samples_per_micro_batch == expected
    assert data.num_micro_batches == -(-samples // expected)


@pytest.mark.parametrize(
    "override",
    [
        "parallel.pipeline_parallel_size=2",
        "parallel.memory_per_worker=2GiB",
        "output=elsewhere",
        "model=elsewhere",
        "calibration.data=elsewhere",
        "calibration.micro_batch_size=1",  # what auto comes to
        "keep_statistics=true",
        "format=compressed-tensors",
        "max_perplexity_increase=0.05",
    ],
)
def test_the_fingerprint_ignores_where_and_how_wide(write: Any, override: str) -> None:
    """Places and parallel sizes do not change the published bytes."""
    assert recipe_fingerprint(load_recipe(write(MINIMAL))) == recipe_fingerprint(
        load_recipe(write(MINIMAL), [override])
    )


@pytest.mark.parametrize(
    "override",
    [
        "calibration.num_samples=64",
        "calibration.seed=1",
        "calibration.micro_batch_size=2",
        "calibration.reduction_blocks=4",
        "ptq.act_quant_dtype=int8",
        "ptq={outliers_suppression: smooth, algo_args: {alpha: 0.6}}",
        "ptq.opname_blacklist=[lm_head]",
        "layer_policies.x=null",
        "format=[ascend]",
        "gram=off",
        "propagation=quantized",
        "max_relative_error=0.1",
        "on_bad_layer=keep_float",
    ],
)
def test_the_fingerprint_changes_with_what_is_published(write: Any, override: str) -> None:
    """Everything that can change a byte changes the fingerprint."""
    assert recipe_fingerprint(load_recipe(write(MINIMAL))) != recipe_fingerprint(
        load_recipe(write(MINIMAL), [override])
    )


def test_the_fingerprint_ignores_the_order_of_layer_policies(write: Any) -> None:
    """Order does not decide between patterns, so it does not count."""
    first = load_recipe(write(MINIMAL + "layer_policies: {a: null, b: {group_size: 0}}"))
    second = load_recipe(write(MINIMAL + "layer_policies: {b: {group_size: 0}, a: null}"))
    assert recipe_fingerprint(first) == recipe_fingerprint(second)


def test_the_published_recipe_names_no_directories(write: Any) -> None:
    """Only last parts of paths are kept, and no key of a URI."""
    config = load_recipe(
        write(RECIPE), ["calibration.data=['s3://KEY:SECRET@bucket/dir/a.parquet?secret=SECRET', /data/b/]"]
    )
    text = published_recipe(config)
    assert "SECRET" not in text
    assert "/" not in text
    assert text.startswith("# The recipe as it was run")
    assert "to run it again give them in full: gs-dist quantize recipe.yaml model=" in text
    document = yaml.safe_load(text)
    assert document["model"] == "Meta-Llama-3-70B"
    assert document["calibration"]["data"] == ["a.parquet", "b"]


def test_the_published_recipe_can_be_read_again(write: Any) -> None:
    """It is a recipe with the same fingerprint."""
    config = load_recipe(write(RECIPE), ["gram=off"])
    again = load_recipe(write(published_recipe(config)))
    assert recipe_fingerprint(again) == recipe_fingerprint(config)
    assert again.parallel == config.parallel


def test_a_secret_in_a_uri_is_not_printed(write: Any) -> None:
    """An error that quotes what was found leaves out user, password and query."""
    (problem,) = refusal(write(MINIMAL), "calibration.column=3", "parallel=s3://KEY:SECRET@host/x?token=SECRET")[1:]
    assert problem == "parallel: found 's3://***@host/x?***'; write a table of keys"


def test_a_recipe_is_frozen() -> None:
    """Nothing can be changed after the checks."""
    config = CalibrationConfig.model_validate({"model": "m", "output": "o", "calibration": {"data": "d"}})
    with pytest.raises(ValueError, match="frozen"):
        config.model = "other"  # type: ignore[misc]  # the assignment is the test


_KEYS = st.sampled_from(
    ["model", "output", "calibration", "ptq", "layer_policies", "parallel", "format", "gram", "data", "seed", "x", "1"]
)
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("auto"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.seconds
@settings(max_examples=150, deadline=None)
@given(document=st.dictionaries(_KEYS, _VALUES, max_size=8))
def test_any_document_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, document: dict[str, Any]) -> None:
    """Whatever the YAML holds, the outcome is a recipe or one RecipeError."""
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(yaml.safe_dump(document, allow_unicode=False), encoding="utf-8")
    try:
        message = "" if load_recipe(path) else "unreachable"
    except RecipeError as error:
        message = str(error)
    assert message == "" or re.match(r"recipe recipe.yaml has \d+ problems?:\n", message)


@settings(max_examples=150, deadline=None)
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    """Whatever the file holds, the outcome is a recipe or one RecipeError."""
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError):
        load_recipe(path)


def test_anchored_paths_are_absolute_and_uris_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers get absolute paths, since their working directory may be another; a URI is no path."""
    monkeypatch.chdir(tmp_path)
    config = CalibrationConfig.model_validate(
        {"model": "m", "output": "o", "calibration": {"data": ["d/*.parquet", "s3://bucket/d", "/abs"]}}
    )
    anchored = config.anchored()
    assert (anchored.model, anchored.output) == (str(tmp_path / "m"), str(tmp_path / "o"))
    assert anchored.calibration.data == (str(tmp_path / "d/*.parquet"), "s3://bucket/d", "/abs")
    assert anchored.fingerprint_fields() == config.fingerprint_fields()


@pytest.mark.parametrize(
    ("ptq", "clips"),
    [
        ("{outliers_suppression: smooth}", True),
        ("{outliers_suppression: outlier-suppression+}", True),
        ("{outliers_suppression: smooth, weight_clip: false}", False),
        ("{outliers_suppression: smooth, act_range: minmax}", False),
        ("{outliers_suppression: smooth, algo_args: {alpha: 0.5}}", False),
        ("{outliers_suppression: smooth, act_quant_granularity: per_token}", False),
        ("{outliers_suppression: outlier-suppression-lite, weight_clip: false}", True),
        ("{}", False),
        ("{weight_clip: true}", True),
    ],
)
def test_weights_are_clipped_where_a_search_moves_outliers_into_them(write: Any, ptq: str, clips: bool) -> None:
    """Left to itself the recipe clips where static activations are smoothed by search, and nowhere else."""
    config = load_recipe(write(MINIMAL + f"ptq: {ptq}"), ["ptq.act_quant_dtype=int8"])
    assert config.network_policy.clips_weights is clips
