import hashlib
import json
import os
import random
import re
from dataclasses import fields, replace
from typing import get_args

import pytest

from ldm_runtime.bundle.files import check_file, sha256_of
from ldm_runtime.bundle.manifest import (
    SCHEMA_VERSION,
    FileRecord,
    encode_manifest,
    load_manifest,
    manifest_digest,
)
from ldm_runtime.errors import BundleError, ManifestError
from ldm_runtime.specs.components import COMPONENTS, DYNAMIC_AXES
from ldm_runtime.specs.model import Task, components_of
from ldm_runtime.specs.networks import ClassEmbedderSpec, Networks
from ldm_runtime.specs.plausible import implausible_fields
from ldm_runtime.testing import TINY_SPEC, tiny_spec


def edit(bundle, change):
    path = bundle / "manifest.json"
    document = json.loads(path.read_bytes())
    change(document)
    document["digest"] = manifest_digest(document)
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
    paths = [path for path in all_keys(json.loads(original)) if path != ("digest",)]

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


def test_a_flipped_bit_of_a_manifest_is_found_or_means_nothing(own_bundle):
    path, chance = own_bundle / "manifest.json", random.Random(0)
    original, manifest = path.read_bytes(), load_manifest(own_bundle)
    refused = 0

    for _ in range(400):
        changed = bytearray(original)
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
        try:
            assert load_manifest(own_bundle) == manifest
        except ManifestError:
            refused += 1

    assert refused > 350


def test_a_manifest_without_its_digest_or_with_another_is_refused(own_bundle):
    path = own_bundle / "manifest.json"
    document = json.loads(path.read_bytes())
    for changed in (document | {"digest": "0" * 64}, document | {"digest": None}):
        path.write_text(json.dumps(changed))
        with pytest.raises(ManifestError, match="was damaged or changed after it was written"):
            load_manifest(own_bundle)
    del document["digest"]
    path.write_text(json.dumps(document))

    with pytest.raises(ManifestError, match="was damaged or changed after it was written"):
        load_manifest(own_bundle)


def test_the_digest_is_the_sha256_of_the_sorted_text_without_it(tiny_bundle):
    document = json.loads((tiny_bundle / "manifest.json").read_bytes())
    stated = document.pop("digest")

    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    assert stated == hashlib.sha256(text.encode()).hexdigest()


def test_a_manifest_is_pinned_by_its_hash(tiny_bundle):
    found = sha256_of(tiny_bundle / "manifest.json")

    assert load_manifest(tiny_bundle, sha256=found.upper()) == load_manifest(tiny_bundle)
    for wrong in ("0" * 64, found[:12], ""):
        with pytest.raises(ManifestError, match=f"has sha256 {found}, not {wrong} as it should"):
            load_manifest(tiny_bundle, sha256=wrong)


def network(name, **values):
    return lambda m: m["spec"]["networks"][name].update(values)


def defaults(**values):
    return lambda m: m["spec"]["defaults"].update(values)


def schedule(change):
    def edited(document):
        alphas = document["spec"]["alphas_cumprod"]
        document["spec"]["alphas_cumprod"] = change(alphas)

    return edited


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (network("unet", channel_mult=[1] * 64), "unet.channel_mult"),
        (network("unet", channel_mult=[1] * 100_000), "unet.channel_mult"),
        (network("unet", channel_mult=[1, 0]), "unet.channel_mult"),
        (network("unet", channel_mult=[1, -1]), "unet.channel_mult"),
        (network("unet", in_channels=3), "unet.in_channels"),
        (network("unet", guidance_dim=3), "unet.guidance_dim"),
        (network("unet", num_res_blocks=0), "unet.num_res_blocks"),
        (network("unet", num_res_blocks=[1]), "unet.num_res_blocks"),
        (network("unet", transformer_depth=[0]), "unet.transformer_depth"),
        (network("unet", transformer_depth=[0, [1, 1]]), "unet.transformer_depth"),
        (network("unet", transformer_depth=[0, -1]), "unet.transformer_depth"),
        (network("unet", transformer_depth=[0, [-1]]), "unet.transformer_depth"),
        (network("unet", transformer_depth=[0, [1]]), "unet.output_depth"),
        (network("unet", output_depth=[0, [1]]), "unet.output_depth"),
        (network("unet", output_depth=[[0] * 2**16, 1]), "unet.output_depth"),
        (network("unet", num_heads=None, num_head_channels=None), "unet.num_heads"),
        (network("unet", model_channels=2**31), "unet.model_channels"),
        (network("autoencoder", channel_mult=[1] * 20_000), "autoencoder.channel_mult"),
        (network("autoencoder", embed_dim=0), "autoencoder.embed_dim"),
        (network("autoencoder", attention_levels=[-1]), "autoencoder.attention_levels"),
        (network("autoencoder", latent_scale_factor=-0.5), "autoencoder.latent_scale_factor"),
        (network("text_encoder", pad_token_id=10**18), "text_encoder.pad_token_id"),
        (network("text_encoder", pad_token_id=-1), "text_encoder.pad_token_id"),
        (network("text_encoder", max_tokens=10**6), "text_encoder.max_tokens"),
        (defaults(height=0), "defaults.height"),
        (defaults(width=10**6), "defaults.width"),
        (defaults(num_inference_steps=10**6), "defaults.num_inference_steps"),
        (schedule(lambda alphas: []), "alphas_cumprod"),
        (schedule(lambda alphas: alphas[::-1]), "alphas_cumprod"),
        (schedule(lambda alphas: alphas[:100]), "alphas_cumprod"),
        (schedule(lambda alphas: alphas[500:]), "alphas_cumprod"),
        (schedule(lambda alphas: [*alphas[:-1], -alphas[-1]]), "alphas_cumprod"),
        (schedule(lambda alphas: [*alphas[:9], alphas[10], *alphas[10:]]), "alphas_cumprod"),
        (schedule(lambda alphas: [1.0, *alphas]), "alphas_cumprod"),
    ],
)
def test_a_value_that_no_model_has_is_an_error_that_names_it(own_bundle, change, field):
    edit(own_bundle, change)

    with pytest.raises(ManifestError, match=re.escape(f"{field} cannot be what it is")):
        load_manifest(own_bundle)


@pytest.mark.parametrize("task", get_args(Task))
def test_the_models_of_all_tasks_are_plausible(task):
    assert list(implausible_fields(tiny_spec(task))) == []


def test_a_manifest_of_many_megabytes_and_one_that_is_no_file_are_errors(own_bundle):
    path = own_bundle / "manifest.json"
    path.write_bytes(path.read_bytes() + b" " * (16 << 20))
    with pytest.raises(ManifestError, match="has more than 16777216 bytes"):
        load_manifest(own_bundle)
    path.unlink()
    os.mkfifo(path)

    with pytest.raises(ManifestError, match="it is not a file"):
        load_manifest(own_bundle)


@pytest.mark.parametrize("hashed", [True, False])
def test_a_link_out_of_the_bundle_and_what_is_no_file_are_refused(tmp_path, hashed):
    bundle, secret = tmp_path / "engines", tmp_path / "secret"
    (bundle / "unet").mkdir(parents=True)
    secret.write_bytes(b"")
    record = FileRecord(path="unet/a.bin", sha256=sha256_of(secret), size_bytes=0)
    path = bundle / record.path

    path.symlink_to(secret)
    with pytest.raises(BundleError, match=r"is a link to .*secret, outside the .*`cp -rL "):
        check_file(bundle, record, hashed=hashed)
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(BundleError, match="is missing"):
        check_file(bundle, record, hashed=hashed)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(BundleError, match="is not a file"):
        check_file(bundle, record, hashed=hashed)
    path.unlink()
    (bundle / "elsewhere").write_bytes(b"")
    path.symlink_to("../elsewhere")
    check_file(bundle, record, hashed=hashed)


def test_a_bundle_may_be_reached_through_a_link(tiny_bundle, tmp_path):
    link = tmp_path / "engines"
    link.symlink_to(tiny_bundle)
    manifest = load_manifest(link)

    for record in manifest.files:
        check_file(link, record)
