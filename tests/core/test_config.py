from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mae_core.config.load import config_differences, dump_config, load_config
from mae_core.config.schema import ConfigError, leaf_names
from mae_core.training.finetune_config import FinetuneConfig
from mae_core.training.pretrain_config import PretrainConfig

SHIPPED = sorted((Path(__file__).parents[2] / "configs" / "pretrain").rglob("*.yaml"))


def refusal(schema, path, overrides=()) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(schema, path, overrides)
    return str(caught.value)


def test_all_errors_come_at_once_each_with_its_origin(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("masking: {ration: 0.75}\noptim: {epochs: -3}\nmodl: {size: base}\n")
    message = refusal(PretrainConfig, file, ["data.image_sise=96", "log.every=often"])
    assert message.startswith("5 problems:")
    lines = message.splitlines()[1:]
    assert len(lines) == 5
    assert f"{file}: unknown key 'masking.ration'; did you mean 'masking.ratio'?" in message
    assert f"{file}: unknown key 'modl'; did you mean 'model'?" in message
    assert "command line: unknown key 'data.image_sise'; did you mean 'data.image_size'?" in message
    assert any(f"{file}: optim.epochs" in line and "greater than 0" in line and "-3" in line for line in lines)
    assert any("command line: log.every" in line and "'often'" in line for line in lines)


@pytest.mark.parametrize(
    "given, meant",
    [
        ("mask_ratio=0.5", "masking.ratio"),
        ("ratio=0.5", "masking.ratio"),
        ("epochs=3", "optim.epochs"),
        ("data.batch_size=4", "optim.batch_size"),
        ("model.sizes=base", "model.size"),
        ("decoder.dept=2", "decoder.depth"),
        ("outptu=x", "output"),
    ],
)
def test_an_unknown_key_on_the_command_line_is_guessed(given, meant):
    message = refusal(PretrainConfig, None, [given])
    assert message == f"command line: unknown key {given.partition('=')[0]!r}; did you mean {meant!r}?"


def test_a_key_like_no_other_names_the_known_ones():
    message = refusal(PretrainConfig, None, ["masking.zzz=1"])
    assert "unknown key 'masking.zzz'" in message and "masking.kind" in message and "masking.ratio" in message


@pytest.mark.parametrize(
    "given, message",
    [
        ("model.size=bas", "unknown name 'bas'; did you mean 'base'?"),
        ("masking.kind=radom", "did you mean 'random'?"),
        ("target.kind=pixel", "did you mean 'pixels'?"),
        ("masking.ratio=1.0", "masking.ratio: input should be less than 1"),
        ("masking.ratio=0", "masking.ratio: input should be greater than 0"),
        ("masking.ratio=0.999", "keeps 0 of 196 patches"),
        ("data.image_size=225", "225x225 does not split into 16x16 patches; use 240x240"),
        ("data.image_size=[224,230]", "224x230 does not split"),
        ("model.patch_size=15", "does not split into 15x15"),
        ("data.mean=[0.5,0.4]", "data.mean: 2 values for 3 channels; give one for each, or one for all"),
        ("data.channels=17", "data.channels"),
        ("data.std=[0.1,0.1,0]", "data.std: input should be greater than 0 (got 0)"),
        ("data.crop_scale=[0.2,1.2]", "data.crop_scale"),
        ("data.crop_scale=[0.8,0.2]", "data.crop_scale: the smaller number must come first"),
        ("optim.betas=[0.9,1.0]", "optim.betas: input should be less than 1"),
        ("optim.base_lr=.inf", "optim.base_lr: input should be a finite number"),
        ("optim.epochs=.nan", "optim.epochs: input should be"),
        (f"seed={2**63}", "seed: input should be less than"),
        ("optim.batch_size=0", "optim.batch_size: input should be greater than or equal to 1 (got 0)"),
        ("precision=fp8", "precision"),
        ("log=3", "log: it is a section; set its options, such as log.every"),
        ("data.image_size=0", "data.image_size: input should be greater than or equal to 1 (got 0)"),
        ("data.image_size=[224]", "data.image_size: a value is missing (got [224])"),
        ("data.image_size=[224,224,3]", "data.image_size: tuple should have at most 2 items"),
        ("data.image_size=224x224", "data.image_size: input should be a valid integer"),
        ("data.std=[0,0,0]", "data.std: input should be greater than 0 (got 0)"),
        ("data.mean=0.5", "data.mean: give a list, such as [1,2] (got 0.5)"),
        ("output=", "output: give a path (got None)"),
    ],
)
def test_a_bad_value_is_named_with_its_place(given, message):
    text = refusal(PretrainConfig, None, [given])
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize("given", [["data=photos", "data.path=x"], ["data.path=x", "data.hflip=0", "data=photos"]])
def test_a_value_for_a_section_does_not_take_the_place_of_its_options(given):
    text = refusal(PretrainConfig, None, given)
    assert text == "data and data.path exclude each other: data is a section; leave data=... out"


def test_the_patch_of_the_size_is_the_one_that_must_fit():
    assert load_config(PretrainConfig, None, ["model.size=huge"]).data.image_size == 224  # 16 x 16 patches of 14
    assert "does not split into 14x14" in refusal(PretrainConfig, None, ["model.size=huge", "data.image_size=256"])


@pytest.mark.parametrize("given", [["weights=a", "from_scratch=true"], []])
def test_weights_or_from_scratch(given):
    assert "give either weights=FILE or from_scratch=true" in refusal(FinetuneConfig, None, given)


def test_a_missing_file_suggests_its_neighbour(tmp_path):
    (tmp_path / "tiny_96.yaml").write_text("")
    message = refusal(PretrainConfig, tmp_path / "tiny96.yaml")
    assert message.endswith(f"does not exist; did you mean {tmp_path / 'tiny_96.yaml'}?")
    assert "x.yaml does not exist; as a recipe" in refusal(PretrainConfig, tmp_path / "other" / "x.yaml")


NINE_FOLD = b"a0: &a0 [x]\n" + b"".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n".encode() for n in range(1, 9)
)
"""Lists of nine aliases each of the list before: small as a text, and without end as values."""


@pytest.mark.parametrize(
    "content, message",
    [
        (b"a: [1", "is not YAML"),
        (b"\xff\xfe\x00bad", "is in UTF-16"),
        (b"\x00\x01\x02\x03bad", "is not a text file"),
        ("output: caf\xe9".encode("latin-1"), "line 1 holds the byte 0xe9, 'é' in Latin-1"),
        (b"- 1\n- 2\n", "must hold keys and values"),
        (b"just words", ""),
        (b"optim: {epochs: '${nowhere}'}", "nowhere"),
        (b"a: 1\na: 2\n", "a"),
        (b"a: &a [*a]\n", "the alias *a contains itself"),
        (b"a: " + b"[" * 3000 + b"]" * 3000, "nested more than 30 levels deep"),
        (NINE_FOLD, "more than 100000 values, those repeated by aliases counted"),
        (b"output: ~nosuchuser/x\n", "there is no home folder for ~nosuchuser/x"),
        (b"output: ${output}\n", "Recursive interpolation"),
        (b"seed: " + b"9" * 5001, "is not YAML"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, content, message):
    file = tmp_path / "broken.yaml"
    file.write_bytes(content)
    text = refusal(PretrainConfig, file)
    assert message in text and str(file) in text


@pytest.mark.parametrize(
    "given", ["optim.epochs", "--epochs=3", "=3", "-x=1", "optim.epochs=[1", "a..b=1", "model.size.x=1"]
)
def test_what_is_no_override_is_refused(given):
    refusal(PretrainConfig, None, [given])


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("optim: {epochs: 7, base_lr: 1e-3}\n")
    config = load_config(PretrainConfig, file, ["optim.epochs=9", "data.path=some/where"])
    assert (config.optim.epochs, config.optim.base_lr, config.optim.weight_decay) == (9, 1e-3, 0.05)
    assert config.data.path == Path("some/where")


def test_a_file_states_what_differs_from_its_base(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "first.yaml").write_text("optim: {epochs: 7, base_lr: 1e-3}\ndata: {crop_scale: [0.1, 0.9]}\n")
    (tmp_path / "second.yaml").write_text("base: first.yaml\noptim: {epochs: 8, betas: [0.5, 0.6]}\n")
    third = tmp_path / "deep" / "third.yaml"
    third.write_text("base: ../second.yaml\ndata: {crop_scale: [0.2, 0.3]}\n")
    config = load_config(PretrainConfig, third, ["optim.betas=[0.1,0.2]"])
    assert (config.optim.epochs, config.optim.base_lr, config.optim.betas) == (8, 1e-3, (0.1, 0.2))
    assert config.data.crop_scale == (0.2, 0.3)
    file = tmp_path / "whole.yaml"
    file.write_text(dump_config(config))
    assert "base:" not in file.read_text() and load_config(PretrainConfig, file) == config


def test_errors_name_the_file_of_the_chain_they_are_in(tmp_path):
    (tmp_path / "first.yaml").write_text("optim: {epochs: -7}\nmodl: 3\n")
    (tmp_path / "second.yaml").write_text("base: first.yaml\nmasking: {ratio: 2}\n")
    message = refusal(PretrainConfig, tmp_path / "second.yaml")
    assert f"{tmp_path / 'first.yaml'}: optim.epochs" in message
    assert f"{tmp_path / 'first.yaml'}: unknown key 'modl'" in message
    assert f"{tmp_path / 'second.yaml'}: masking.ratio" in message


@pytest.mark.parametrize(
    "base, message",
    [
        ("none.yaml", "its base {root}/none.yaml does not exist; the path is relative to {root}"),
        ("mine.yaml", "{root}/mine.yaml is its own base"),
        ("other.yaml", "{root}/mine.yaml is its own base, by way of {root}/mine.yaml, {root}/other.yaml"),
        ("3", "base must be the path of another configuration file, not 3"),
    ],
)
def test_a_base_that_is_none_is_refused(tmp_path, base, message):
    (tmp_path / "mine.yaml").write_text(f"base: {base}\n")
    (tmp_path / "other.yaml").write_text("base: mine.yaml\n")
    assert message.format(root=tmp_path) in refusal(PretrainConfig, tmp_path / "mine.yaml")


ROWS = sorted((Path(__file__).parents[2] / "configs" / "pretrain" / "table1").glob("[a-f]_*.yaml"))


@pytest.mark.parametrize("file", ROWS, ids=lambda path: path.name)
def test_a_row_of_table_1_is_the_baseline_but_for_what_its_name_says(file):
    differences = config_differences(
        load_config(PretrainConfig, file.with_name("baseline.yaml")), load_config(PretrainConfig, file)
    )
    section = {"a": "decoder.depth", "b": "decoder.width", "c": "masking", "d": "target", "e": "data", "f": "masking"}
    assert differences and all(line.startswith(section[file.name[0]]) for line in differences)
    assert len(differences) <= 3


def test_the_baseline_of_table_1_is_the_papers():
    config = load_config(PretrainConfig, ROWS[0].with_name("baseline.yaml"))
    assert (config.model.size, config.target.kind, config.optim.epochs) == ("large", "pixels", 800)
    assert (config.decoder.depth, config.decoder.width, config.optim.lr) == (8, 512, pytest.approx(2.4e-3))
    assert len(ROWS) == 18  # Table 1a to 1f has 24 rows, six of which are the baseline


def test_an_empty_file_is_the_defaults(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_config(PretrainConfig, tmp_path / "empty.yaml") == PretrainConfig()


@given(
    st.sampled_from(["nano", "tiny", "base"]),
    st.floats(0.1, 0.9),
    st.one_of(st.integers(1, 20).map(lambda n: n * 16), st.tuples(*[st.integers(2, 9).map(lambda n: n * 16)] * 2)),
    st.floats(1e-6, 1.0),
    st.one_of(st.none(), st.text(alphabet="abc /._-é", min_size=1, max_size=12)),
    st.sampled_from([None, [0.5], [1e-3]]),
)
def test_dumping_and_loading_gives_the_same_configuration(tmp_path_factory, size, ratio, side, lr, path, mean):
    sections = {
        "model": {"size": size, "patch_size": 4},
        "masking": {"ratio": ratio},
        "data": {"image_size": side, "path": path, "mean": mean, "channels": 1 if mean else 3},
        "optim": {"base_lr": lr},
    }
    config = PretrainConfig.model_validate(sections)
    file = tmp_path_factory.mktemp("round") / "config.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    assert load_config(PretrainConfig, file) == config
    assert config_differences(config, load_config(PretrainConfig, file)) == []


def test_differences_name_the_leaves():
    one = PretrainConfig()
    other = load_config(PretrainConfig, None, ["optim.epochs=3", "seed=1"])
    assert config_differences(one, other) == ["seed: 0 -> 1", "optim.epochs: 800.0 -> 3.0"]


def test_a_configuration_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        PretrainConfig().seed = 3


def test_the_defaults_are_the_papers():
    pretrain, finetune = PretrainConfig(), load_config(FinetuneConfig, None, ["weights=somewhere"])
    assert pretrain.optim.lr == pytest.approx(2.4e-3)
    assert (pretrain.optim.betas, pretrain.optim.weight_decay, pretrain.optim.warmup_epochs) == ((0.9, 0.95), 0.05, 40)
    assert (pretrain.masking.ratio, pretrain.data.crop_scale, pretrain.decoder.width) == (0.75, (0.2, 1.0), 512)
    assert finetune.optim.lr == pytest.approx(2e-3)
    assert (finetune.optim.layer_decay, finetune.data.mixup, finetune.data.cutmix) == (0.65, 0.8, 1.0)


def test_from_scratch_is_table_11():
    base = load_config(FinetuneConfig, None, ["from_scratch=true"])
    large = load_config(FinetuneConfig, None, ["from_scratch=true", "model.size=large"])
    for config in (base, large):
        assert config.optim.lr == pytest.approx(1.6e-3) and config.optim.layer_decay == 1.0 and config.ema == 0.9999
        assert (config.optim.weight_decay, config.optim.betas, config.optim.warmup_epochs) == (0.3, (0.9, 0.95), 20)
        assert (config.data.mixup, config.data.cutmix, config.data.random_erasing) == (0.8, 1.0, 0.0)
        assert (config.data.auto_augment, config.data.label_smoothing) == ("rand-m9-mstd0.5-inc1", 0.1)
    assert (base.optim.epochs, base.model.drop_path, base.optim.batch_size) == (300, 0.1, 4096)
    assert (large.optim.epochs, large.model.drop_path, large.optim.batch_size) == (200, 0.2, 4096)


def test_what_is_typed_wins_over_table_11_and_a_file_is_taken_as_it_is(tmp_path):
    typed = load_config(
        FinetuneConfig, None, ["from_scratch=true", "model.size=huge", "ema=null", "optim.base_lr=1e-3"]
    )
    assert (typed.optim.base_lr, typed.optim.epochs, typed.ema, typed.optim.weight_decay) == (1e-3, 200, None, 0.3)
    file = tmp_path / "mine.yaml"
    file.write_text("from_scratch: true\noptim: {base_lr: 1e-3}\nmodel: {size: huge}\n")
    config = load_config(FinetuneConfig, file, ["data.random_erasing=0.5"])
    assert (config.optim.base_lr, config.optim.epochs, config.optim.weight_decay) == (1e-3, 100, 0.05)
    assert (config.ema, config.data.random_erasing) == (None, 0.5)
    assert "optim: it is a section; set its options, such as optim.epochs" in refusal(FinetuneConfig, file, ["optim=3"])
    assert "optim: it is a section; set its options, such as optim.epochs" in refusal(
        FinetuneConfig, None, ["from_scratch=true", "optim=3"]
    )


def test_an_initialisation_is_for_new_weights():
    assert load_config(FinetuneConfig, None, ["from_scratch=true", "model.init=timm"]).model.init == "timm"
    message = refusal(FinetuneConfig, None, ["weights=x", "model.init=timm"])
    assert "model.init=timm applies only to training from scratch" in message


@pytest.mark.parametrize("blocks", ["0.5", "1", "12"])
def test_trainable_blocks_are_whole_or_half(blocks):
    config = load_config(FinetuneConfig, None, ["weights=x", f"trainable_blocks={blocks}"])
    assert config.trainable_blocks == float(blocks)


@pytest.mark.parametrize("blocks", ["1.5", "0", "-1", "0.25"])
def test_other_trainable_blocks_are_refused(blocks):
    assert "trainable_blocks" in refusal(FinetuneConfig, None, ["weights=x", f"trainable_blocks={blocks}"])


@pytest.mark.parametrize("file", SHIPPED, ids=lambda path: path.name)
def test_shipped_pretraining_files_are_valid(file):
    assert isinstance(load_config(PretrainConfig, file), PretrainConfig)


def test_leaf_names_are_dotted_and_unique():
    names = leaf_names(FinetuneConfig)
    assert {"weights", "optim.layer_decay", "data.path", "log.every"} <= set(names)
    assert len(names) == len(set(names))


def test_what_does_not_go_together_is_blamed_on_who_said_it(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("model: {patch_size: 16}\n")
    assert refusal(PretrainConfig, file, ["data.image_size=50"]).startswith("command line: ")
    file.write_text("data: {image_size: 50}\n")
    assert refusal(PretrainConfig, file, ["data.workers=1"]).startswith(f"{file}: ")
    file.write_text("data: {mean: [0.5, 0.4]}\n")
    assert refusal(PretrainConfig, file, ["data.workers=1"]).startswith(f"{file}: data.mean: 2 values")


def test_paths_are_names_and_know_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config(PretrainConfig, None, ["output=007", "data.path=~/images"])
    assert (config.output, config.data.path) == (Path("007"), tmp_path / "images")
    (tmp_path / "mine.yaml").write_text("output: 2024\n", encoding="utf-8-sig")
    assert load_config(PretrainConfig, tmp_path / "mine.yaml").output == Path("2024")


@pytest.mark.parametrize(
    "name",
    ["set #2", "a: b", "{x", "[y", "1e3", "no", "007", "${seed}", "a,b", "'quoted", "*x", "&y", "!z", "a=b", "%"],
)
def test_a_path_on_the_command_line_is_taken_as_it_is_typed(name):
    config = load_config(PretrainConfig, None, [f"data.path=/x/{name}", f"output={name}", f"watch.labelled={name}"])
    assert (config.data.path, config.output, config.watch.labelled) == (Path(f"/x/{name}"), Path(name), Path(name))
    assert load_config(FinetuneConfig, None, ["output=x", f"weights={name}"]).weights == Path(name)


def test_several_paths_and_none_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    several = load_config(PretrainConfig, None, ["output=x", "data.path=[/x/set #1, b: c, 'd e']"]).data.path
    assert several == (Path("/x/set #1"), Path("b: c"), Path("d e"))
    (tmp_path / "[a, b]").mkdir()
    assert load_config(PretrainConfig, None, ["output=x", "data.path=[a, b]"]).data.path == Path("[a, b]")
    file = tmp_path / "mine.yaml"
    file.write_text("output: x\nweights: y\ndata: {path: z}\n")
    assert load_config(FinetuneConfig, file, ["weights=null", "from_scratch=true"]).weights is None
    assert load_config(FinetuneConfig, file, ["data.path='a b'"]).data.path == Path("a b")


def test_a_path_of_a_file_may_follow_one_of_the_command_line(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("output: x\nwatch: {path: '${data.path}'}\n")
    assert load_config(PretrainConfig, file, ["data.path=/a #1"]).watch.path == Path("/a #1")
