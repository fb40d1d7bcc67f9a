import json
from dataclasses import fields, replace

import pytest

from ldm_runtime.bundle.files import check_file, sha256_of
from ldm_runtime.bundle.manifest import SCHEMA_VERSION, FileRecord, encode_manifest, load_manifest
from ldm_runtime.errors import BundleError, ManifestError
from ldm_runtime.specs.components import COMPONENTS, DYNAMIC_AXES
from ldm_runtime.specs.model import components_of
from ldm_runtime.specs.networks import ClassEmbedderSpec, Networks
from ldm_runtime.testing import TINY_SPEC


def edit(bundle, change):
    path = bundle / "manifest.json"
    document = json.loads(path.read_bytes())
    change(document)
    path.write_text(json.dumps(document))


def all_keys(value, path=()):
    """Every key of every record in a document, as a path."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, each in items:
        if isinstance(value, dict) and path != ("build", "versions"):
            yield (*path, key)
        if isinstance(each, dict | list) and not (isinstance(value, list) and key > 0):
            yield from all_keys(each, (*path, key))


def test_a_manifest_survives_its_file(tiny_bundle):
    manifest = load_manifest(tiny_bundle)

    assert encode_manifest(manifest) == (tiny_bundle / "manifest.json").read_bytes()
    assert manifest.spec == TINY_SPEC


def test_every_misspelt_key_is_an_error_that_names_it(own_bundle):
    original = (own_bundle / "manifest.json").read_bytes()
    paths = list(all_keys(json.loads(original)))

    for path in paths:
        (own_bundle / "manifest.json").write_bytes(original)

        def misspell(document, path=path):
            for key in path[:-1]:
                document = document[key]
            document[f"{path[-1]}x"] = document.pop(path[-1])

        edit(own_bundle, misspell)
        with pytest.raises(ManifestError, match=f"(required field|networks).*{path[-1]}"):
            load_manifest(own_bundle)

    assert len(paths) > 60


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(weights_dtype="fp17"), r"Invalid enum value 'fp17'.*weights_dtype"),
        (lambda m: m["spec"]["networks"]["unet"].update(in_channels="4"), r"in_channels"),
        (lambda m: m["spec"]["networks"]["unet"].update(in_channels=True), r"in_channels"),
        (lambda m: m["spec"].update(alphas_cumprod=[None]), r"alphas_cumprod\[0\]|\[\.\.\.\]"),
        (lambda m: m.update(schema_version="1"), r"schema_version"),
        (lambda m: m["preview"]["matrix"].pop(), r"length 3.*preview\.matrix"),
        (lambda m: m["preview"].update(r2=None), r"preview\.r2"),
        (
            lambda m: m["spec"]["networks"]["unet"].update(channel_mult=[]),
            r"unet\.channel_mult cannot",
        ),
        (
            lambda m: m["spec"]["networks"]["autoencoder"].update(channel_mult=[]),
            r"autoencoder\.channel_mult",
        ),
        (
            lambda m: m["spec"]["networks"]["autoencoder"].update(latent_scale_factor=0),
            "latent_scale_factor",
        ),
        (
            lambda m: m["spec"]["networks"]["text_encoder"].update(max_tokens=1),
            "max_tokens cannot be",
        ),
        (lambda m: m.update(tokenizer_file=None), "tokenizer_file cannot be"),
    ],
)
def test_a_wrong_value_is_an_error_that_says_where(own_bundle, change, message):
    edit(own_bundle, change)

    with pytest.raises(ManifestError, match=message):
        load_manifest(own_bundle)


def test_a_newer_manifest_is_an_error_even_if_it_looks_different(own_bundle):
    newer = json.dumps({"schema_version": SCHEMA_VERSION + 1, "everything": "else"})
    (own_bundle / "manifest.json").write_text(newer)

    with pytest.raises(ManifestError, match=f"this runtime reads {SCHEMA_VERSION}; upgrade"):
        load_manifest(own_bundle)


def test_a_manifest_of_schema_1_is_too_old_and_not_malformed(own_bundle):
    def age(document):
        document["schema_version"] = 1
        del document["preview"]

    edit(own_bundle, age)

    with pytest.raises(ManifestError) as caught:
        load_manifest(own_bundle)
    assert str(caught.value) == (
        f"{own_bundle / 'manifest.json'} has schema 1 of an older ldm-export, this runtime reads "
        f"{SCHEMA_VERSION}; export the checkpoint again"
    )


def test_a_bundle_may_have_no_preview(own_bundle):
    edit(own_bundle, lambda document: document.update(preview=None))

    assert load_manifest(own_bundle).preview is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'"\xff"', b"[" * 10**5])
def test_what_is_no_json_record_is_an_error(own_bundle, content):
    (own_bundle / "manifest.json").write_bytes(content)

    with pytest.raises(ManifestError, match=r"manifest\.json: .*export the bundle again"):
        load_manifest(own_bundle)


def test_a_folder_without_a_manifest_and_a_file_are_no_bundle(tmp_path):
    (tmp_path / "file").touch()

    for path in (tmp_path, tmp_path / "file", tmp_path / "nowhere"):
        with pytest.raises(ManifestError, match="not found"):
            load_manifest(path)


def test_a_manifest_that_cannot_be_read_is_an_error(tmp_path):
    (tmp_path / "manifest.json").mkdir()

    with pytest.raises(ManifestError, match="cannot be read"):
        load_manifest(tmp_path)


def test_an_unknown_component_is_an_error_that_lists_the_known_ones(tiny_bundle):
    manifest = load_manifest(tiny_bundle)

    assert manifest.component("unet").name == "unet"
    with pytest.raises(BundleError, match="no component 'depth'; it has text_encoder, unet"):
        manifest.component("depth")


@pytest.mark.parametrize("row", COMPONENTS.values(), ids=lambda row: row.name)
def test_every_axis_is_either_dynamic_or_a_hyperparameter(row):
    axes = {axis for each in (*row.inputs, *row.outputs) for axis in each.axes}
    integers = {each.name for each in row.inputs if each.dtype == "int64"}

    assert axes - DYNAMIC_AXES == row.lengths.keys()
    assert not DYNAMIC_AXES & row.lengths.keys()
    assert row.counts.keys() == integers
    attributes = {field.name for field in fields(row.record)} | {*dir(row.record)}
    assert {*row.lengths.values(), *row.counts.values()} <= attributes


@pytest.mark.parametrize(
    ("networks", "problem"),
    [
        ([], "networks must be an object"),
        ({}, "networks must include an autoencoder"),
        ({"autoencoder": {}}, "autoencoder: Object missing required field"),
        ({"autoencoder": {}, "depth_encoder": {}}, "unknown networks depth_encoder"),
    ],
)
def test_networks_that_this_runtime_does_not_know_are_an_error(own_bundle, networks, problem):
    edit(own_bundle, lambda document: document["spec"].update(networks=networks))

    with pytest.raises(ManifestError, match=f"{problem}.*spec.networks.*export the bundle again"):
        load_manifest(own_bundle)


def test_networks_are_compared_by_value_and_a_model_without_one_says_so():
    same = replace(TINY_SPEC, networks=Networks(**TINY_SPEC.networks))

    assert (same, hash(same)) == (TINY_SPEC, hash(TINY_SPEC))
    assert TINY_SPEC.with_networks(text_encoder=None) != TINY_SPEC
    with pytest.raises(LookupError, match="no ClassEmbedderSpec among autoencoder, text_encoder"):
        TINY_SPEC.network(ClassEmbedderSpec)


def test_an_input_with_an_axis_that_the_model_does_not_have_is_left_out():
    unet = replace(TINY_SPEC.unet, context_dim=None)

    plain = components_of(TINY_SPEC.with_networks(unet=unet))["unet"]

    assert [each.name for each in plain.inputs] == ["latents", "timesteps"]
    assert [each.name for each in components_of(TINY_SPEC)["unet"].inputs][2:] == ["context"]


def test_a_file_is_checked_by_size_and_then_by_content(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"weights")
    record = FileRecord(path="a.bin", sha256=sha256_of(path), size_bytes=7)

    check_file(tmp_path, record)
    path.write_bytes(b"WEIGHTS")

    check_file(tmp_path, record, hashed=False)
    with pytest.raises(BundleError, match="sha256"):
        check_file(tmp_path, record)
    path.write_bytes(b"weight")
    with pytest.raises(BundleError, match="has 6 bytes, the manifest says 7"):
        check_file(tmp_path, record, hashed=False)
    path.unlink()
    with pytest.raises(BundleError, match="is missing"):
        check_file(tmp_path, record)
