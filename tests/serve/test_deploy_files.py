"""The files of deploy/, against schemas of Kubernetes and KubeRay, hadolint and our own parsers."""

import itertools
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from ldm_runtime.cli.commands import build_parser, main
from ldm_serve.board import GRACE_SECONDS
from ldm_serve.cli import KEYS_VARIABLE, settings_of
from tests.runtime.triton_configs import config_of, tensors

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILES = sorted(DEPLOY.glob("*.Dockerfile"))
KUBERNETES = "1.37"
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
PAGE = (ROOT / "docs/deployment.md").read_text(encoding="utf-8")
#: Lines of a shell that the page has and no test runs.
LINES = [
    line
    for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]
KEYS = {KEYS_VARIABLE: f"alice:{'k' * 22}"}


def settings(arguments):
    args = build_parser().parse_args(["serve", *arguments])
    return args, settings_of(args, KEYS)


def instructions(path):
    """Return the instructions of a Dockerfile: pairs of the keyword and what follows."""
    text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", "")
    return [tuple(line.strip().split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def last_stage(path):
    found = instructions(path)
    start = max(place for place, (word, _) in enumerate(found) if word == "FROM")
    return found[start:]


def documents(name):
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def document(name, kind):
    (found,) = (each for each in documents(name) if each["kind"] == kind)
    return found


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
class TestDockerfiles:
    def test_hadolint_finds_nothing(self, path):
        hadolint = Path(sys.executable).with_name("hadolint")
        done = subprocess.run([hadolint, path], capture_output=True, text=True, check=False)

        assert (done.returncode, done.stdout) == (0, "")

    def test_extras_are_those_of_the_package_and_have_no_torch(self, path):
        (extras,) = (
            value.removeprefix("EXTRAS=").split(",")
            for word, value in instructions(path)
            if word == "ARG" and value.startswith("EXTRAS=")
        )

        assert {"serve"} < set(extras) <= EXTRAS.keys()
        assert {"cpu", "cuda"} & set(extras) == {path.name.partition(".")[0]}
        needed = [each for extra in extras for each in EXTRAS[extra]]
        assert not any(each.startswith(("torch", "onnx>")) for each in needed)

    def test_the_command_serves_the_mounted_bundle_on_the_port_that_is_probed(self, path):
        stage = dict(last_stage(path))
        words = json.loads(stage["ENTRYPOINT"]) + json.loads(stage["CMD"])

        assert words[:2] == ["ldm", "serve"]
        args, found = settings(words[2:])
        assert found.bundles == {"engines": Path("/bundle")}
        assert str(args.port) == stage["EXPOSE"]
        assert f"http://127.0.0.1:{args.port}/livez" in stage["HEALTHCHECK"]
        assert stage["STOPSIGNAL"] == "SIGTERM"

    def test_the_last_image_is_pinned_not_root_and_has_the_environment_alone(self, path):
        stage = last_stage(path)

        assert all(
            re.fullmatch(r"[\w./-]+:\d[\w.-]*( AS build)?", value)
            for word, value in instructions(path)
            if word == "FROM"
        )
        assert dict(stage)["USER"] == "10001:10001"
        assert [value for word, value in stage if word == "COPY"] == [
            "--from=build /opt/ldm /opt/ldm"
        ]

    def test_what_it_copies_is_there_and_in_the_context(self, path):
        copied = {
            source
            for word, value in instructions(path)
            if word == "COPY" and "--from" not in value
            for source in value.split()[:-1]
        }
        lines = (ROOT / ".dockerignore").read_text().splitlines()

        assert {"pyproject.toml", "ldm_serve"} < copied
        assert copied == {line[1:] for line in lines if line.startswith("!")}
        assert all((ROOT / each).exists() for each in copied)
        assert lines.index("*") < lines.index("!pyproject.toml")


def test_the_health_check_tells_a_server_that_lives_from_one_that_does_not(server):
    """It is run as it stands, but for the way to the server."""
    (path, *_) = DOCKERFILES
    command = json.loads(dict(last_stage(path))["HEALTHCHECK"].partition("CMD ")[2])
    assert command[:2] == ["python", "-c"]
    over = (
        "import http.client, socket, urllib.request\n"
        "def connect(self):\n"
        "    self.sock = socket.socket(socket.AF_UNIX); self.sock.connect({!r})\n"
        "http.client.HTTPConnection.connect = connect\n"
    )

    def status(socket):
        code = over.format(str(socket)) + command[2]
        return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)

    assert status(server.socket).returncode == 0
    assert status(server.socket.with_name("none")).returncode == 1


@pytest.mark.parametrize("each", documents("kubernetes.yaml"), ids=lambda each: each["kind"])
def test_kubernetes_takes_every_document(each):
    kubernetes_validate.validate(each, KUBERNETES, strict=True)


def test_a_misspelt_field_would_be_found():
    deployment = document("kubernetes.yaml", "Deployment")
    deployment["spec"]["template"]["spec"]["terminationGracePeriod"] = 1

    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, KUBERNETES, strict=True)


def test_the_deployment_serves_and_has_the_time_to_drain():
    pod = document("kubernetes.yaml", "Deployment")["spec"]["template"]
    (container,) = pod["spec"]["containers"]

    args, found = settings(container["args"][1:])

    assert container["args"][0] == "serve"
    (port,) = (each["containerPort"] for each in container["ports"])
    assert port == args.port == int(pod["metadata"]["annotations"]["prometheus.io/port"])
    needed = container["lifecycle"]["preStop"]["sleep"]["seconds"] + found.drain_seconds
    assert pod["spec"]["terminationGracePeriodSeconds"] > needed + 2 * GRACE_SECONDS + 5
    (keys,) = (each for each in container["env"] if each["name"] == KEYS_VARIABLE)
    assert "secretKeyRef" in keys["valueFrom"]
    (mount,) = (each for each in container["volumeMounts"] if each["name"] == "bundle")
    assert {Path(mount["mountPath"])} == set(found.bundles.values())
    assert mount["readOnly"]


def test_probes_and_metrics_are_paths_of_the_server(client):
    pod = document("kubernetes.yaml", "Deployment")["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    probes = {
        name: container[name]["httpGet"]["path"] for name in container if name.endswith("Probe")
    }

    assert probes == {
        "startupProbe": "/readyz", "readinessProbe": "/readyz", "livenessProbe": "/livez"
    }  # fmt: skip
    for path in {*probes.values(), pod["metadata"]["annotations"]["prometheus.io/path"]}:
        assert client.get(path).status_code == 200


def test_labels_select_the_pods():
    deployment = document("kubernetes.yaml", "Deployment")["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    others = ("Service", "PodDisruptionBudget")
    service, budget = (document("kubernetes.yaml", kind)["spec"]["selector"] for kind in others)

    assert deployment["selector"]["matchLabels"] == service == budget["matchLabels"] == labels


def ray_service():
    return document("kuberay.yaml", "RayService")


def ray_groups():
    cluster = ray_service()["spec"]["rayClusterConfig"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def test_kuberay_takes_the_service():
    schema = json.loads(Path(__file__).with_name("ray_service_schema.json").read_text())
    validator = jsonschema.Draft202012Validator(schema)
    service = ray_service()

    validator.validate(service)
    service["spec"]["rayClusterConfig"]["authOptions"]["mode"] = "tokens"
    assert not validator.is_valid(service)


def test_kubernetes_takes_the_pods_of_ray_and_the_policy():
    kubernetes_validate.validate(document("kuberay.yaml", "NetworkPolicy"), KUBERNETES, strict=True)
    for group in ray_groups():
        pods = {"apiVersion": "v1", "kind": "PodTemplate", "template": group["template"]}
        kubernetes_validate.validate(pods, KUBERNETES, strict=True)


def test_ray_takes_a_token_and_every_pod_is_probed():
    assert ray_service()["spec"]["rayClusterConfig"]["authOptions"] == {"mode": "token"}
    for group in ray_groups():
        (container,) = group["template"]["spec"]["containers"]
        assert {"readinessProbe", "livenessProbe"} < container.keys()
        assert {each["name"] for each in container["env"]} >= {KEYS_VARIABLE, "PYTHONPATH"}


def test_ray_serves_with_flags_of_ldm_serve_and_the_time_to_drain():
    service = ray_service()["spec"]
    (application,) = yaml.safe_load(service["serveConfigV2"])["applications"]
    (deployment,) = application["deployments"]

    _, found = settings(shlex.split(application["args"]["flags"]))

    assert found.bundles == {"engines": Path("/bundle")}
    assert deployment["graceful_shutdown_timeout_s"] > found.drain_seconds + GRACE_SECONDS
    (workers,) = service["rayClusterConfig"]["workerGroupSpecs"]
    grace = workers["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > deployment["graceful_shutdown_timeout_s"]
    (container,) = workers["template"]["spec"]["containers"]
    gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
    needed = deployment["num_replicas"] * deployment["ray_actor_options"]["num_gpus"]
    assert gpus * workers["replicas"] == needed


@pytest.mark.parametrize("line", LINES)
def test_the_lines_of_the_page_name_what_there_is(line):
    words = shlex.split(line, comments=True)

    for word in words:
        assert not word.startswith("deploy/") or (ROOT / word).is_file(), word
    while "=" in words[0]:
        words.pop(0)
    if words[:2] == ["ldm", "serve"]:
        assert settings(words[2:])[1].bundles
    else:
        assert words[0] in ("docker", "kubectl", "curl", "cd")


def test_the_container_is_run_as_it_was_made():
    (line,) = (line for line in LINES if line.startswith("docker run"))
    words = shlex.split(line)
    (path,) = DEPLOY.glob(f"{words[-1].partition(':')[2]}.Dockerfile")
    stage = dict(last_stage(path))

    _, found = settings(json.loads(stage["CMD"])[1:])

    options = dict(itertools.pairwise(words))
    assert options["-e"] == KEYS_VARIABLE
    assert options["-p"].split(":")[1] == stage["EXPOSE"]
    assert options["-v"].split(":")[1:] == [str(found.bundles["engines"]), "ro"]
    (extras,) = re.findall(r"`--build-arg EXTRAS=([\w,]+)`", PAGE)
    assert set(extras.split(",")) < EXTRAS.keys()


def test_ray_is_given_flags_of_ldm_serve_by_the_page_and_by_the_file():
    (line,) = (line for line in LINES if "serve run" in line)
    usage = line.removeprefix("cd deploy && ")

    assert usage in (DEPLOY / "ray_serve.py").read_text()
    *command, module, flags = shlex.split(usage)
    assert (command, module) == (["serve", "run"], "ray_serve:application")
    assert settings(shlex.split(flags.removeprefix("flags=")))[1].bundles


def test_the_secret_of_the_page_is_that_of_the_pods():
    (line,) = (line for line in LINES if "create secret" in line)
    pod = document("kubernetes.yaml", "Deployment")["spec"]["template"]["spec"]
    (environment,) = pod["containers"][0]["env"]

    reference = environment["valueFrom"]["secretKeyRef"]
    assert f"secret generic {reference['name']} --from-literal={reference['key']}=" in line


def test_the_call_of_triton_is_one_that_its_model_takes(bundle, tmp_path):
    (line,) = (line for line in LINES if line.startswith("curl"))
    words = shlex.split(line)
    assert main(["triton", str(bundle), "--out", str(tmp_path), "--name", "sd15"]) == 0
    config = config_of(tmp_path / words[1].split("/")[3])

    (given,) = json.loads(words[words.index("-d") + 1])["inputs"]

    required = {each.name: each for each in config.input if not each.optional}
    assert given["name"] in required
    assert len(required) == 1
    assert tensors(required.values())[given["name"]] == ("TYPE_STRING", given["shape"][1:])
    assert (given["datatype"], len(given["data"])) == ("BYTES", given["shape"][0])
