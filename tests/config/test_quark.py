"""Recipes as AMD Quark's users write them (features C1-C6) mean what Quark's documentation says."""

import dataclasses
from dataclasses import replace

import pytest

from fewbit import RTNConfig, quark
from fewbit.config.algorithms import ScalingLayer
from fewbit.config.matching import resolve
from fewbit.errors import ConfigError
from fewbit.quark import (
    AWQConfig,
    Config,
    Dtype,
    GPTQConfig,
    PerBlockMXObserver,
    PerChannelMinMaxObserver,
    PerGroupMinMaxObserver,
    PerTensorHistogramObserver,
    PerTensorMinMaxObserver,
    PerTensorMSEObserver,
    PerTensorPercentileObserver,
    PlaceholderObserver,
    QSchemeType,
    QuantizationConfig,
    QuantizationSpec,
    RoundType,
    ScaleType,
    SmoothQuantConfig,
)

UINT4_PER_GROUP = QuantizationSpec(
    dtype=Dtype.uint4,
    observer_cls=PerGroupMinMaxObserver,
    symmetric=False,
    scale_type=ScaleType.float,
    round_method=RoundType.half_even,
    qscheme=QSchemeType.per_group,
    ch_axis=1,
    is_dynamic=False,
    group_size=128,
)
INT8_PER_TENSOR = QuantizationSpec(
    dtype=Dtype.int8,
    qscheme=QSchemeType.per_tensor,
    observer_cls=PerTensorMinMaxObserver,
    symmetric=True,
    scale_type=ScaleType.float,
    round_method=RoundType.half_even,
    is_dynamic=False,
)
FP8_PER_TENSOR = QuantizationSpec(
    dtype=Dtype.fp8_e4m3, qscheme=QSchemeType.per_tensor, observer_cls=PerTensorMinMaxObserver, is_dynamic=False
)
LAYERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
SCALING_LAYERS = [
    {
        "prev_op": "input_layernorm",
        "layers": list(LAYERS),
        "inp": "self_attn.q_proj",
        "module2inspect": "self_attn",
        "has_kwargs": True,
        "condition": "",
        "help": "attention input",
    },
    {"prev_op": "mlp.up_proj", "layers": ["mlp.down_proj"], "inp": "mlp.down_proj"},
]


class TestSpec:
    def test_uint4_per_group_is_fewbits_own_spec(self):
        assert (
            QuantizationSpec(
                dtype="uint4", qscheme="per_group", group_size=128, symmetric=False, observer="minmax", ch_axis=1
            )
            == UINT4_PER_GROUP
        )
        assert UINT4_PER_GROUP.tiling.scale_shape((8, 256)) == (8, 2)

    def test_int8_per_tensor_is_fewbits_own_spec(self):
        assert QuantizationSpec(dtype="int8", qscheme="per_tensor", observer="minmax") == INT8_PER_TENSOR

    @pytest.mark.parametrize(
        ("dtype", "name"),
        [
            (Dtype.int8, "int8"),
            (Dtype.int4, "int4"),
            (Dtype.int2, "int2"),
            (Dtype.fp8_e4m3, "e4m3"),
            (Dtype.fp8_e5m2, "e5m2"),
            (Dtype.fp6_e3m2, "e3m2"),
            (Dtype.fp6_e2m3, "e2m3"),
            (Dtype.fp4, "e2m1"),
            ("fp8_e4m3", "e4m3"),
            ("fp6_e2m3", "e2m3"),
            ("fp4", "e2m1"),
        ],
    )
    def test_element_formats(self, dtype, name):
        assert QuantizationSpec(dtype=dtype, qscheme=QSchemeType.per_tensor).format.name == name

    @pytest.mark.parametrize("dtype", [Dtype.uint8, Dtype.uint4, Dtype.uint2])
    def test_unsigned_formats(self, dtype):
        assert QuantizationSpec(dtype=dtype, qscheme="per_tensor", symmetric=False).format.name == str(dtype)

    @pytest.mark.parametrize("dtype", [Dtype.bfloat16, Dtype.float16])
    @pytest.mark.parametrize("observer", [{}, {"observer_cls": PlaceholderObserver}])
    def test_casts_need_nothing_else(self, dtype, observer):
        spec = QuantizationSpec(dtype=dtype, **observer)
        assert (spec.format.is_cast, spec.qscheme, spec.observer) == (True, "per_tensor", "placeholder")

    @pytest.mark.parametrize("element", [Dtype.fp4, Dtype.fp6_e2m3, Dtype.fp6_e3m2, Dtype.fp8_e4m3, Dtype.int8])
    def test_mx_is_blocks_of_32_with_a_bare_exponent(self, element):
        spec = QuantizationSpec(
            dtype=Dtype.mx, mx_element_dtype=element, observer_cls=PerBlockMXObserver, is_dynamic=True, ch_axis=-1
        )
        assert spec.dtype == QuantizationSpec(dtype=element, qscheme="per_tensor").dtype
        assert (spec.scale_type, spec.group_size, spec.exponent_mode) == ("e8m0", 32, "even")
        assert spec.observer == "minmax"

    @pytest.mark.parametrize(("mode", "size"), [("floor", 32), ("ceil", 16)])
    def test_mx_takes_a_mode_and_a_size(self, mode, size):
        spec = QuantizationSpec(dtype="mx", mx_element_dtype="fp4", scale_calculation_mode=mode, group_size=size)
        assert (spec.exponent_mode, spec.group_size) == (mode, size)

    @pytest.mark.parametrize(
        ("dtype", "size", "bits"), [(Dtype.mx6, 16, 6.0), (Dtype.mx9, 16, 9.0), (Dtype.bfp16, 8, 9.0)]
    )
    def test_block_formats_have_the_bits_of_their_definition(self, dtype, size, bits):
        spec = QuantizationSpec(dtype=dtype, group_size=size, ch_axis=-1, observer_cls=PerBlockMXObserver)
        assert spec == QuantizationSpec(dtype=dtype, ch_axis=-1, observer="minmax")
        assert spec.stored_bits((64, 64)) == bits * 64 * 64

    @pytest.mark.parametrize(
        ("observer", "name", "qscheme"),
        [
            (PerTensorMinMaxObserver, "minmax", "per_tensor"),
            (PerChannelMinMaxObserver, "minmax", "per_channel"),
            (PerTensorPercentileObserver, "percentile", "per_tensor"),
            (PerTensorMSEObserver, "mse", "per_tensor"),
            (PerTensorHistogramObserver, "histogram", "per_tensor"),
            ("PerTensorMSEObserver", "mse", "per_tensor"),
        ],
    )
    def test_observers_are_a_rule_and_a_granularity(self, observer, name, qscheme):
        spec = QuantizationSpec(dtype=Dtype.int8, observer_cls=observer)
        assert (spec.observer, spec.qscheme) == (name, qscheme)

    def test_none_is_not_said(self):
        said = {"dtype": Dtype.fp8_e4m3, "qscheme": "per_group", "group_size": 64, "observer_cls": PerBlockMXObserver}
        unsaid = {"symmetric": None, "scale_calculation_mode": None, "round_method": None, "zero_point_type": None}
        assert QuantizationSpec(**said, **unsaid, scale_format="float32") == QuantizationSpec(**said)

    def test_groups_as_quarks_first_releases_wrote_them(self):
        """Quark 0.1 to 0.2: the channel's observer and axis, though groups ran along rows."""
        options = {"dtype": Dtype.uint4, "symmetric": False, "qscheme": QSchemeType.per_group, "group_size": 32}
        old = QuantizationSpec(**options, observer_cls=PerChannelMinMaxObserver, ch_axis=0)
        assert old == QuantizationSpec(**options, observer_cls=PerGroupMinMaxObserver)
        assert old.tiling.scale_shape((6, 64)) == (6, 2)

    @pytest.mark.parametrize("qscheme", list(QSchemeType))
    def test_granularities(self, qscheme):
        sizes = {QSchemeType.per_group: {"group_size": 32}, QSchemeType.per_block: {"block_size": (128, 128)}}
        assert QuantizationSpec(qscheme=qscheme, **sizes.get(qscheme, {})).qscheme == str(qscheme)

    @pytest.mark.parametrize("method", list(RoundType))
    def test_round_methods(self, method):
        assert QuantizationSpec(qscheme="per_tensor", round_method=method).round_method == str(method)

    @pytest.mark.parametrize(
        ("given", "kind", "dtype"),
        [
            (ScaleType.float, "float", "checkpoint"),
            (ScaleType.pof2, "pof2", "checkpoint"),
            (ScaleType.float32, "float", "float32"),
            (ScaleType.float16, "float", "float16"),
            (ScaleType.bfloat16, "float", "bfloat16"),
        ],
    )
    def test_scale_types(self, given, kind, dtype):
        spec = QuantizationSpec(qscheme="per_tensor", scale_type=given)
        assert (spec.scale_type, spec.scale_dtype) == (kind, dtype)

    @pytest.mark.parametrize(("given", "kind"), [("float32", "float"), ("e4m3", "e4m3"), ("e8m0", "e8m0")])
    def test_scale_formats(self, given, kind):
        assert QuantizationSpec(dtype="fp4", group_size=16, scale_format=given).scale_type == kind

    @pytest.mark.parametrize(("axis", "shape"), [(None, (6, 1)), (1, (6, 1)), (-1, (6, 1)), (0, (1, 8)), (-2, (1, 8))])
    def test_a_group_of_minus_one_is_the_whole_axis_along_which_groups_run(self, axis, shape):
        spec = QuantizationSpec(qscheme=QSchemeType.per_group, group_size=-1, ch_axis=axis)
        assert spec.tiling.scale_shape((6, 8)) == shape

    @pytest.mark.parametrize(
        ("fields", "named"),
        [
            ({"observer_cls": PerTensorMinMaxObserver, "qscheme": QSchemeType.per_group}, "observer_cls"),
            ({"observer_cls": PerGroupMinMaxObserver, "qscheme": QSchemeType.per_channel}, "observer_cls"),
            ({"observer_cls": "PerTensorMinMax"}, "unknown observer_cls 'PerTensorMinMax'; known: .*MinMaxObserver"),
            ({"observer_cls": int}, "observer_cls"),
            ({"observer_cls": PerTensorMinMaxObserver, "observer": "minmax"}, "observer or observer_cls"),
            ({"observer_cls": PerGroupMinMaxObserver}, "group_size"),
            ({"dtype": Dtype.mx}, "mx_element_dtype"),
            ({"dtype": Dtype.int8, "mx_element_dtype": Dtype.fp4, "qscheme": "per_tensor"}, "mx_element_dtype"),
            ({"dtype": Dtype.mx9, "group_size": 32}, "group_size 32"),
            ({"dtype": Dtype.bfp16, "group_size": 16}, "group_size 16"),
            ({"dtype": Dtype.mx, "mx_element_dtype": "fp4", "scale_type": ScaleType.pof2}, "scale_type pof2"),
            ({"dtype": Dtype.mx, "mx_element_dtype": "fp4", "qscheme": "per_channel"}, "qscheme per_channel"),
            ({"dtype": Dtype.mx6, "scale_calculation_mode": "ceil"}, "exponent_mode ceil"),
            ({"dtype": Dtype.bfp16, "scale_format": "e4m3"}, "scale_type e4m3"),
            ({"dtype": Dtype.bfloat16, "observer_cls": PerTensorMinMaxObserver}, "observer minmax"),
            ({"qscheme": "per_tensor", "zero_point_type": "float32"}, "zero_point_type"),
            ({"qscheme": "per_tensor", "qat_spec": object()}, "qat_spec"),
            ({"qscheme": "per_tensor", "is_scale_quant": True}, "is_scale_quant"),
            ({"qscheme": "per_tensor", "observer_clas": 1}, "did you mean 'observer'"),
        ],
    )
    def test_what_contradicts_itself_is_refused_and_the_field_named(self, fields, named):
        with pytest.raises(ConfigError, match=named) as caught:
            QuantizationSpec(**fields)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "spec",
        [
            UINT4_PER_GROUP,
            FP8_PER_TENSOR,
            QuantizationSpec(dtype=Dtype.mx, mx_element_dtype=Dtype.fp4),
            QuantizationSpec(dtype=Dtype.mx6),
            QuantizationSpec(dtype=Dtype.bfp16),
            QuantizationSpec(dtype=Dtype.bfloat16),
        ],
        ids=str,
    )
    def test_replace_changes_nothing_else(self, spec):
        assert replace(spec) == spec
        assert QuantizationSpec(**dataclasses.asdict(spec)) == spec
        assert replace(spec, residual=True) == QuantizationSpec(**dataclasses.asdict(spec) | {"residual": True})


class TestModuleConfig:
    def test_each_tensor_has_its_spec_or_none(self):
        config = QuantizationConfig(
            input_tensors=INT8_PER_TENSOR, weight=UINT4_PER_GROUP, output_tensors=FP8_PER_TENSOR, bias=INT8_PER_TENSOR
        )
        assert (config.weight, config.bias) == (UINT4_PER_GROUP, INT8_PER_TENSOR)
        assert config.activations == {"input_tensors": INT8_PER_TENSOR, "output_tensors": FP8_PER_TENSOR}
        assert QuantizationConfig().activations == {}

    def test_a_list_of_two_is_a_first_and_a_second_stage(self):
        second = QuantizationSpec(dtype=Dtype.int4, observer_cls=PerChannelMinMaxObserver, ch_axis=0)
        config = QuantizationConfig(weight=[FP8_PER_TENSOR, second])
        assert config.weight == replace(second, first_stage=FP8_PER_TENSOR)

    @pytest.mark.parametrize("specs", [[], [FP8_PER_TENSOR], [FP8_PER_TENSOR] * 3])
    def test_other_lists_are_refused(self, specs):
        with pytest.raises(ConfigError, match="weight: a list holds two specs"):
            QuantizationConfig(weight=specs)

    def test_a_table_is_read_like_the_class(self):
        table = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "observer_cls": "PerTensorMinMaxObserver"}
        assert QuantizationConfig(weight=table).weight == FP8_PER_TENSOR
        with pytest.raises(ConfigError, match="QuantizationSpec has no field 'qschem'; did you mean 'qscheme'"):
            QuantizationConfig(weight={"qschem": "per_tensor"})


class TestAlgorithms:
    def test_awq(self):
        config = AWQConfig(scaling_layers=SCALING_LAYERS, model_decoder_layers="model.layers", embedding_layers=["e"])
        assert config.scaling_layers == (
            ScalingLayer(prev_op="input_layernorm", layers=LAYERS),
            ScalingLayer(prev_op="mlp.up_proj", layers=("mlp.down_proj",)),
        )
        assert AWQConfig(duo_scaling=False) == AWQConfig(duo_scale=False)

    def test_smoothquant(self):
        config = SmoothQuantConfig(
            alpha=0.85, scale_clamp_min=1e-3, scaling_layers=SCALING_LAYERS, model_decoder_layers="model.layers"
        )
        assert (config.alpha, config.scale_clamp_min) == (0.85, 1e-3)
        assert config.scaling_layers[1].layers == ("mlp.down_proj",)
        assert SmoothQuantConfig(smoothing_strength=0.5) == SmoothQuantConfig(alpha=0.5)

    def test_gptq(self):
        config = GPTQConfig(
            damp_percent=0.02,
            desc_act=True,
            static_groups=True,
            true_sequential=True,
            inside_layer_modules=[*LAYERS],
            model_decoder_layers="model.layers",
            embedding_layers=["model.embed_tokens"],
        )
        assert config == GPTQConfig(damping=0.02, order="activation")

    @pytest.mark.parametrize(
        ("theirs", "ours"),
        [
            ({"desc_act": False}, {"order": "none"}),
            ({"desc_act": False, "static_groups": False}, {"order": "none"}),
            ({"quantization_order": "default"}, {"order": "none"}),
            ({"quantization_order": "activation"}, {"order": "activation"}),
            ({"blocksize": 64, "damp": 0.1}, {"block_size": 64, "damping": 0.1}),
            ({"damp_percent": None, "desc_act": None}, {}),
            *(({"actorder": order}, {"order": "activation"}) for order in (True, "static", "weight", "activation")),
            *(({"actorder": order}, {"order": "none"}) for order in (False, None, "none")),
        ],
    )
    def test_gptqs_options_by_other_names(self, theirs, ours):
        assert GPTQConfig(**theirs) == GPTQConfig(**ours)

    @pytest.mark.parametrize(
        ("cls", "fields", "named"),
        [
            (GPTQConfig, {"static_groups": False}, "static_groups"),
            (GPTQConfig, {"true_sequential": False}, "true_sequential"),
            (GPTQConfig, {"damp_percent": 1.0}, "damping"),
            (GPTQConfig, {"damp_percent": 0.1, "damping": 0.01}, "damp_percent and damping are two names"),
            (GPTQConfig, {"desc_act": True, "quantization_order": "default"}, "desc_act and quantization_order"),
            (GPTQConfig, {"actorder": "group"}, "actorder group moves columns"),
            (GPTQConfig, {"actorder": "foo"}, "order"),
            (GPTQConfig, {"bits": 4, "group_size": 64}, "SequentialGPTQConfig"),
            (SmoothQuantConfig, {"w_method": "per-block"}, "SequentialSmoothQuantConfig"),
            (SmoothQuantConfig, {"alpha": 0.5, "smoothing_strength": 0.2}, "alpha and smoothing_strength"),
            (AWQConfig, {"scaling_layers": [{"prev_op": "a"}]}, "layers"),
            (AWQConfig, {"scaling_layers": [{"prev_op": "a", "layer": ["b"]}]}, "did you mean 'layers'"),
            (AWQConfig, {"scaling_layers": "auto"}, "scaling_layers"),
            (SmoothQuantConfig, {"alpha": 1.5}, "alpha"),
            (SmoothQuantConfig, {"scale_clamp_min": 0}, "scale_clamp_min"),
        ],
    )
    def test_what_cannot_be_honoured_is_refused_and_the_field_named(self, cls, fields, named):
        with pytest.raises(ConfigError, match=named):
            cls(**fields)


class TestConfig:
    CONFIG = Config(
        global_quant_config=QuantizationConfig(weight=UINT4_PER_GROUP),
        layer_type_quant_config={"Linear": QuantizationConfig(weight=INT8_PER_TENSOR)},
        layer_quant_config={
            "*.k_proj": QuantizationConfig(weight=UINT4_PER_GROUP, output_tensors=FP8_PER_TENSOR),
            "*.v_proj": QuantizationConfig(weight=UINT4_PER_GROUP, output_tensors=FP8_PER_TENSOR),
        },
        exclude=["lm_head"],
        algo_config=AWQConfig(scaling_layers=SCALING_LAYERS),
        quant_mode="eager_mode",
    )

    def test_one_algorithm_may_stand_alone(self):
        assert self.CONFIG.algo_config == (AWQConfig(scaling_layers=SCALING_LAYERS), RTNConfig())

    def test_no_algorithm_is_rounding_to_nearest(self):
        assert Config(QuantizationConfig(weight=UINT4_PER_GROUP), algo_config=None).algo_config == (RTNConfig(),)

    def test_algorithms_may_be_listed(self):
        config = replace(self.CONFIG, algo_config=[AWQConfig(), GPTQConfig()])
        assert config.algo_config == (AWQConfig(), GPTQConfig())

    def test_replace_changes_the_field_and_nothing_else(self):
        config = replace(self.CONFIG, exclude=["lm_head", "*.down_proj"])
        assert config.exclude == ("lm_head", "*.down_proj")
        assert replace(config, exclude=self.CONFIG.exclude) == self.CONFIG

    def test_it_survives_plain_data(self):
        assert Config.from_dict(self.CONFIG.to_dict()) == self.CONFIG

    def test_wildcards_quantize_the_outputs_of_k_and_v(self):
        modules = {"model.layers.0.self_attn.k_proj": "Linear", "model.layers.0.self_attn.v_proj": "Linear"}
        modules |= {"model.layers.0.mlp.up_proj": "Linear", "lm_head": "Linear"}
        found = resolve(self.CONFIG, modules)
        for name in ("k_proj", "v_proj"):
            assert found[f"model.layers.0.self_attn.{name}"].config.output_tensors == FP8_PER_TENSOR
        assert found["model.layers.0.mlp.up_proj"].config.weight == INT8_PER_TENSOR
        assert found["lm_head"].config is None

    @pytest.mark.parametrize("mode", ["fx", "fx_graph_mode"])
    def test_a_graph_mode_is_refused(self, mode):
        with pytest.raises(ConfigError, match="quant_mode must be eager"):
            replace(self.CONFIG, quant_mode=mode)


@pytest.mark.parametrize("member", [member for member in Dtype if member.name not in ("mx", "mx6", "mx9", "bfp16")])
def test_a_dtype_is_the_same_by_its_name_and_by_its_member(member):
    fields = {"qscheme": "per_tensor", "symmetric": not member.name.startswith("u")}
    assert QuantizationSpec(dtype=member, **fields) == QuantizationSpec(dtype=member.name, **fields)


class TestConfigDefaults:
    """Every field of Quark's Config can be given with its default, and what has no counterpart says where to turn."""

    WEIGHT = QuantizationConfig(weight=QuantizationSpec(dtype="int4", group_size=64))

    def test_none_is_quark_s_default(self):
        plain = Config(global_quant_config=self.WEIGHT, algo_config=None)
        given = Config(
            global_quant_config=self.WEIGHT,
            layer_type_quant_config=None,
            layer_quant_config=None,
            exclude=None,
            algo_config=None,
            quant_mode=None,
            pre_quant_opt_config=None,
            log_severity_level=None,
            version=None,
            kv_cache_quant_config=None,
            softmax_quant_spec=None,
        )
        assert given == plain
        assert given.algo_config == (RTNConfig(),)

    def test_values_of_later_versions(self):
        given = Config(
            global_quant_config=self.WEIGHT,
            layer_type_quant_config={},
            layer_quant_config={},
            kv_cache_quant_config={},
            kv_cache_group=[],
            min_kv_scale=0.0,
            exclude=[],
            algo_config=[],
            quant_mode=quark.QuantizationMode.eager_mode,
            log_severity_level=1,
            version="0.13",
        )
        assert given == Config(global_quant_config=self.WEIGHT, algo_config=None)

    @pytest.mark.parametrize("mode", ["fx_graph_mode", quark.QuantizationMode.fx_graph_mode])
    def test_another_mode_is_refused(self, mode):
        with pytest.raises(ConfigError, match="quant_mode must be eager"):
            Config(global_quant_config=self.WEIGHT, quant_mode=mode)

    @pytest.mark.parametrize(
        ("fields", "sentence"),
        [
            ({"min_kv_scale": 1.0}, "no field 'min_kv_scale'; give"),
            ({"softmax_quant_spec": FP8_PER_TENSOR}, "AttentionConfig\\(probabilities"),
            ({"kv_cache_post_rope": True}, "after rotary embeddings"),
            ({"shared_scale_groups": [["*.q_proj"]]}, "leave it out"),
        ],
    )
    def test_what_is_said_elsewhere_here_says_where(self, fields, sentence):
        with pytest.raises(ConfigError, match=sentence):
            Config(global_quant_config=self.WEIGHT, **fields)

    def test_pre_quant_opt_config_joins_the_algorithms(self):
        smooth = SmoothQuantConfig(alpha=0.5)
        expected = Config(global_quant_config=self.WEIGHT, algo_config=[smooth, GPTQConfig()])
        for before in (smooth, [smooth]):
            given = Config(global_quant_config=self.WEIGHT, pre_quant_opt_config=before, algo_config=GPTQConfig())
            assert given == expected
        alone = Config(global_quant_config=self.WEIGHT, pre_quant_opt_config=smooth)
        assert alone.algo_config == (smooth, RTNConfig())

    def test_the_cache_s_entries_win(self):
        cache = QuantizationConfig(weight=UINT4_PER_GROUP, output_tensors=FP8_PER_TENSOR)
        given = Config(
            global_quant_config=self.WEIGHT,
            layer_quant_config={"*proj": self.WEIGHT, "*.k_proj": self.WEIGHT},
            kv_cache_quant_config={"*.k_proj": cache},
        )
        found = resolve(given, {"a.k_proj": "Linear", "a.v_proj": "Linear"})
        assert (found["a.k_proj"].config, found["a.v_proj"].config) == (cache, self.WEIGHT)

    def test_a_dictionary_of_quark_s_is_a_recipe(self):
        weight = {
            "dtype": "uint4",
            "is_dynamic": False,
            "qscheme": "per_group",
            "ch_axis": 1,
            "group_size": 128,
            "symmetric": False,
            "round_method": "half_even",
            "scale_type": "float",
            "scale_format": None,
            "scale_calculation_mode": None,
            "mx_element_dtype": None,
            "observer_cls": "PerGroupMinMaxObserver",
            "is_scale_quant": False,
        }
        nothing = {"input_tensors": None, "output_tensors": None, "bias": None, "target_device": None}
        given = Config.from_dict(
            {
                "global_quant_config": {"weight": weight, **nothing},
                "exclude": ["lm_head"],
                "algo_config": [{"name": "smooth", "alpha": 0.5, "scaling_layers": [], "model_decoder_layers": ""}],
                "softmax_quant_spec": None,
                "quant_method": "quark",
                "layer_type_quant_config": {},
                "layer_quant_config": {},
                "kv_cache_quant_config": {},
                "quant_mode": "eager_mode",
                "version": "0.10",
            }
        )
        assert given.global_quant_config == QuantizationConfig(weight=UINT4_PER_GROUP)
        assert given.algo_config == (SmoothQuantConfig(alpha=0.5), RTNConfig())

    def test_wide_integers_are_said_not_to_be_stored(self):
        int16 = QuantizationSpec(dtype=Dtype.int16, qscheme="per_tensor", observer="minmax")
        for fields in ({"weight": int16}, {"weight": UINT4_PER_GROUP, "input_tensors": int16}):
            with pytest.raises(ConfigError, match=r"int16 can be rounded to .* but not stored"):
                Config(global_quant_config=QuantizationConfig(**fields))


def test_algo_config_names_the_classes_of_algorithms():
    assert isinstance(GPTQConfig(), quark.AlgoConfig)
    assert not isinstance("gptq", quark.AlgoConfig)
