"""Manifests against recipes, entry point, image and package: what can be checked of them without a cluster."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dialects
import pytest
import typer.main
import yaml
from checkpoints import header_only_checkpoint, tiny_config
from packaging.requirements import Requirement

import gs_dist
from gs_dist.checkpoint.check import check
from gs_dist.checkpoint.dialects import codec_of
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.model.families import read_architecture
from gs_dist.planning.cluster_facts import ClusterFacts
from gs_dist.planning.plan import make_plan
from gs_dist.recipe.config import CalibrationConfig, load_recipe
from gs_dist.recipe.matching import resolve_policies
from gs_dist.recipe.sizes import parse_size
from gs_dist.terminal.cli import app

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "jobs/recipes").glob("*.yaml"))
IN_IMAGE = "/opt/gs_dist"


@dataclass(frozen=True)
class Deployment:
    """What a manifest offers to a job."""

    num_npus: int
    num_nodes: int  # with cards
    memory_per_node: int  # as Ray counts it
    object_store: int  # of a node
    cpus_per_node: int
    images: set[str]
    mounts: tuple[set[str], ...]  # of every container that runs gs_dist
    text: str

    @property
    def recipe(self) -> CalibrationConfig:
        """The recipe that the manifest, or the comment on top of it, submits."""
        return load_recipe(ROOT / self.entry_point[1].removeprefix(IN_IMAGE + "/"))

    @property
    def facts(self) -> ClusterFacts:
        """What a job learns of the cluster."""
        facts = ClusterFacts.described(
            num_nodes=self.num_nodes,
            npus=self.num_npus // self.num_nodes,
            cpus=self.cpus_per_node,
            memory=self.memory_per_node,
            device="ascend",
        )
        assert facts is not None
        return facts

    @property
    def entry_point(self) -> tuple[str, str]:
        """Paths within the image: of the program and of the recipe."""
        commands = set(re.findall(r"python3 (\S+/quantize\.py) ([^\s\"']+\.yaml)", self.text))
        (command,) = commands
        return command


def kuberay(name: str) -> Deployment:
    text = (ROOT / "deploy" / name).read_text()
    document = yaml.safe_load(text)
    spec = document["spec"]["rayClusterSpec"] if document["kind"] == "RayJob" else document["spec"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    containers = [container for group in groups for container in group["template"]["spec"]["containers"]]
    (workers,) = spec["workerGroupSpecs"]
    limits = containers[-1]["resources"]["limits"]  # which KubeRay hands to `ray start` as cores and memory
    return Deployment(
        num_nodes=workers["replicas"],
        memory_per_node=parse_size(limits["memory"] + "B"),
        object_store=int(workers["rayStartParams"]["object-store-memory"]),
        cpus_per_node=int(limits["cpu"]),
        num_npus=sum(group["replicas"] * npus(group["rayStartParams"]) for group in spec["workerGroupSpecs"]),
        images={container["image"] for container in containers},
        mounts=tuple({mount["mountPath"] for mount in container["volumeMounts"]} for container in containers),
        text=text,
    )


def npus(ray_start_params: dict[str, str]) -> int:
    """The NPU resource of a group; KubeRay pastes the value into a shell command, hence the quotes within."""
    (value,) = shlex.split(ray_start_params["resources"])
    return int(json.loads(value)["NPU"])


def on_premises() -> Deployment:
    text = (ROOT / "deploy/on-premises.yaml").read_text()
    config = yaml.safe_load(text)
    nodes = {"head": 1, "worker": len(config["provider"]["worker_ips"])}
    cards, sizes = 0, set()
    for kind, count in nodes.items():
        (start,) = (command for command in config[f"{kind}_start_ray_commands"] if "ray start" in command)
        options = dict(word.split("=", 1) for word in shlex.split(start) if word.startswith("--") and "=" in word)
        cards += count * json.loads(options["--resources"])["NPU"]
        sizes.add((int(options["--memory"]), int(options["--object-store-memory"])))
    ((memory, object_store),) = sizes
    volumes = [o.removeprefix("--volume=") for o in config["docker"]["run_options"] if o.startswith("--volume=")]
    return Deployment(
        num_npus=cards,
        num_nodes=sum(nodes.values()),
        memory_per_node=memory,
        object_store=object_store,
        cpus_per_node=192,  # of the servers in deploy/README.md: Ray counts all of them
        images={config["docker"]["image"]},
        mounts=({volume.split(":")[1] for volume in volumes},),
        text=text,
    )


DEPLOYMENTS = {
    "rayjob.yaml": kuberay("rayjob.yaml"),
    "raycluster.yaml": kuberay("raycluster.yaml"),
    "on-premises.yaml": on_premises(),
}


@pytest.fixture(params=DEPLOYMENTS)
def deployment(request: pytest.FixtureRequest) -> Deployment:
    return DEPLOYMENTS[request.param]


def ray_requirement() -> Requirement:
    text = (ROOT / "pyproject.toml").read_text()
    (line,) = re.findall(r'"(ray\[default\][^"]*)"', text)
    return Requirement(line)


def test_cluster_has_a_card_for_every_worker(deployment: Deployment) -> None:
    """The cards of the cluster are as many as stages times replicas of the recipe it runs."""
    parallel = deployment.recipe.parallel
    assert parallel.device == "ascend"
    assert parallel.pipeline_parallel_size * parallel.data_parallel_size == deployment.num_npus


def test_the_job_waits_for_all_nodes_of_the_cluster(deployment: Deployment) -> None:
    """What is submitted says how many there will be: pods and servers join one after another."""
    (awaited,) = set(re.findall(r"quantize\.py \S+\.yaml --nodes (\d+)", deployment.text))
    assert int(awaited) == deployment.num_nodes


def test_one_image_of_this_version(deployment: Deployment) -> None:
    """Head and workers run one image, whose tag is this package's version, and whose build the Dockerfile names."""
    (image,) = deployment.images
    assert image.rpartition(":")[2] == gs_dist.__version__
    assert f"-t {image} ." in (ROOT / "deploy/Dockerfile").read_text()
    assert f"-t {image} ." in (ROOT / "deploy/README.md").read_text()


def test_entry_point_is_in_the_image(deployment: Deployment) -> None:
    """The program and the recipe that are submitted lie where the Dockerfile copies them to."""
    dockerfile = (ROOT / "deploy/Dockerfile").read_text()
    assert f"WORKDIR {IN_IMAGE}\n" in dockerfile
    assert "COPY jobs jobs\n" in dockerfile
    for path in deployment.entry_point:
        assert (ROOT / path.removeprefix(IN_IMAGE + "/")).is_file()


def test_what_the_dockerfile_copies_is_there() -> None:
    """Every source of a COPY exists in the repository."""
    sources = re.findall(r"^COPY (.*) \S+$", (ROOT / "deploy/Dockerfile").read_text(), flags=re.MULTILINE)
    assert sources
    assert all((ROOT / source).exists() for line in sources for source in line.split())


def test_recipes_paths_are_mounted(deployment: Deployment) -> None:
    """Model, data and output of the recipe lie on shared storage in every container."""
    recipe = deployment.recipe
    for path in (recipe.model, recipe.output, *recipe.calibration.data):
        for mounts in deployment.mounts:
            assert any(Path(path).is_relative_to(mount) for mount in mounts), f"{path} is on none of {mounts}"


def workers_and_requests(spec: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for group in spec["workerGroupSpecs"]:
        for container in group["template"]["spec"]["containers"]:
            yield group, container


@pytest.mark.parametrize("name", ["rayjob.yaml", "raycluster.yaml"])
def test_ray_and_kubernetes_count_the_same_cards(name: str) -> None:
    """What Ray is told a node has is what its pod asks the device plugin for, with Ray of the pinned version."""
    document = yaml.safe_load((ROOT / "deploy" / name).read_text())
    spec = document["spec"].get("rayClusterSpec", document["spec"])
    for group, container in workers_and_requests(spec):
        resources = container["resources"]
        assert resources["requests"] == resources["limits"]
        assert int(resources["limits"]["huawei.com/Ascend910"]) == npus(group["rayStartParams"])
        assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]
        named = {volume["name"] for volume in group["template"]["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == named
    assert spec["rayVersion"] in ray_requirement().specifier


def test_both_kuberay_manifests_hold_one_cluster() -> None:
    """The cluster of the job and the standing cluster are the same."""
    job = yaml.safe_load((ROOT / "deploy/rayjob.yaml").read_text())["spec"]["rayClusterSpec"]
    assert job == yaml.safe_load((ROOT / "deploy/raycluster.yaml").read_text())["spec"]


def test_storage_claim_is_the_one_that_pods_mount() -> None:
    """The claim that storage.yaml makes is the one the pods name, and many nodes may write to it."""
    claim = yaml.safe_load((ROOT / "deploy/storage.yaml").read_text())
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for name in ("rayjob.yaml", "raycluster.yaml", "evaluate.yaml"):
        claims = set(re.findall(r"claimName: ([\w-]+)", (ROOT / "deploy" / name).read_text()))
        assert claims == {claim["metadata"]["name"]}


def test_nobody_submits_without_a_token() -> None:
    """Every cluster asks for a token and opens no way in from outside."""
    for name in ("rayjob.yaml", "raycluster.yaml", "evaluate.yaml"):
        document = yaml.safe_load((ROOT / "deploy" / name).read_text())
        spec = document["spec"].get("rayClusterSpec", document["spec"])
        assert spec["authOptions"]["mode"] == "token"
        assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    for path in (ROOT / "deploy").glob("*.yaml"):
        assert not re.search(r"NodePort|LoadBalancer|kind: Ingress|hostPort|hostNetwork", path.read_text())
    config = yaml.safe_load((ROOT / "deploy/on-premises.yaml").read_text())
    assert "--env=RAY_AUTH_MODE=token" in [option.split(" ")[0] for option in config["docker"]["run_options"]]
    (head,) = (command for command in config["head_start_ray_commands"] if "ray start" in command)
    assert "--dashboard-host=127.0.0.1" in head


def test_on_premises_file_passes_rays_own_check() -> None:
    """`ray up` accepts the file: its schema, and as many workers as addresses."""
    from ray.autoscaler._private.util import prepare_config, validate_config  # its schema; no cluster is started

    config = yaml.safe_load((ROOT / "deploy/on-premises.yaml").read_text())
    assert config["min_workers"] == config["max_workers"] == len(config["provider"]["worker_ips"])
    validate_config(prepare_config(config))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_load(recipe: Path) -> None:
    """Every recipe that is shipped passes the checks of a recipe, and writes to a place of its own."""
    config = load_recipe(recipe)
    assert Path(config.output).name == recipe.stem


ENGINES = {
    "llama3-70b-w8a8": ["vllm-ascend"],
    "qwen3-32b-w8a8": ["vllm-ascend"],
    "llama3-70b-w4a16": ["vllm", "transformers"],
    "smollm2-w8a8": ["vllm", "transformers", "vllm-ascend"],
}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_publish_what_their_engines_serve(tmp_path: Path, recipe: Path) -> None:
    """A model of a recipe's policies, in each of its formats, breaks no rule of the engines that the recipe is for."""
    config = load_recipe(recipe)
    architecture = read_architecture(tiny_config(hidden_size=128))
    policies = resolve_policies(
        architecture.linear_names(),
        config.network_policy,
        config.resolved_layer_policies,
        config.ptq.opname_blacklist,
    )
    for name in config.dialects:
        codec_of(name).check_policies(policies, architecture)
        dialects.save_model(tmp_path / name, codec_of(name), dict(policies), hidden_size=128)
        for engine in ENGINES[recipe.stem]:
            assert check(tmp_path / name, engine).problems == ()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CheckpointReader]:
    """Headers of the models of large recipes."""
    directory = tmp_path_factory.mktemp("models")
    return {
        name: CheckpointReader(header_only_checkpoint(directory / name, name)) for name in ("llama-3-70b", "qwen3-32b")
    }


@pytest.mark.parametrize(
    ("recipe", "model", "layers"),
    [
        ("llama3-70b-w8a8", "llama-3-70b", 10),
        ("llama3-70b-w4a16", "llama-3-70b", 10),
        ("qwen3-32b-w8a8", "qwen3-32b", 16),
    ],
)
def test_large_recipes_fit_cards_and_nodes(
    models: dict[str, CheckpointReader], deployment: Deployment, recipe: str, model: str, layers: int
) -> None:
    """With the model's real shapes workers stay within their card, and all that a node may hold within its memory.

    That memory also holds Ray's object store, which KubeRay keeps in the pod's memory, too.
    """
    config, reader = load_recipe(ROOT / f"jobs/recipes/{recipe}.yaml"), models[model]
    sizes = config.parallel.pipeline_parallel_size, config.parallel.data_parallel_size
    plan = make_plan(config, reader.architecture, reader.tensors, deployment.facts)
    assert (len(plan.stages), plan.data_parallel_size) == sizes
    assert plan.device == "ascend"
    assert all(len(stage.layers) == layers for stage in plan.stages)
    assert all(stage.memory.peak <= 60 * 2**30 for stage in plan.stages)
    cards = deployment.num_npus // deployment.num_nodes
    assert deployment.cpus_per_node >= plan.threads_per_worker * min(cards, plan.num_workers // deployment.num_nodes)
    beside = min(cards, deployment.cpus_per_node // plan.threads_per_worker)
    assert beside * plan.host_peak + deployment.object_store <= deployment.memory_per_node


def test_the_object_store_leaves_workers_their_share(deployment: Deployment) -> None:
    """What is planned for workers and Ray's object store fit a node together, with something for the system."""
    assert 0.8 * deployment.memory_per_node + deployment.object_store <= 0.98 * deployment.memory_per_node
    if "--shm-size=" in deployment.text:
        (shm,) = re.findall(r"--shm-size=(\d+)g", deployment.text)
        assert deployment.object_store <= 0.95 * int(shm) * 2**30  # the part of it that Ray takes at most


def command_line(words: list[str]) -> dict[str, Any]:
    """Parameters that `gs-dist` reads from a command."""
    assert words[0] == "gs-dist"
    group: Any = typer.main.get_command(app)
    command = group.commands[words[1]]
    return dict(command.make_context(words[1], words[2:]).params)


def commands_of(text: str) -> list[dict[str, Any]]:
    """Those of `gs-dist` with options, over several lines, in a text."""
    found = re.findall(r"gs-dist (?:plan|evaluate)(?:[^`#\n]*\\\n)*[^`#\n]*--[^`#\n]*", text)
    return [command_line(shlex.split(command.replace("\\\n", " "))) for command in found]


def test_the_plans_that_are_recommended_are_of_the_cluster_of_the_manifests() -> None:
    """Sizes of nodes on the command lines of the documentation are those that pods and servers have."""
    commands = [c for c in commands_of((ROOT / "deploy/README.md").read_text()) if "recipe" in c]
    assert len(commands) == 2
    for command in commands:
        for deployment in DEPLOYMENTS.values():
            assert command["nodes"] == deployment.num_nodes
            assert command["nodes"] * command["npus"] == deployment.num_npus
            assert command["cpus"] <= deployment.cpus_per_node
            assert parse_size(command["memory"]) == deployment.memory_per_node


def test_a_published_model_is_evaluated_on_one_node() -> None:
    """The manifest's command is the documented one: of what the recipe makes, a stage a card, in the job's cluster."""
    document = yaml.safe_load((ROOT / "deploy/evaluate.yaml").read_text())
    spec = document["spec"]["rayClusterSpec"]
    job = yaml.safe_load((ROOT / "deploy/rayjob.yaml").read_text())["spec"]["rayClusterSpec"]
    (workers,), (of_job,) = spec["workerGroupSpecs"], job["workerGroupSpecs"]
    nodes = {"replicas": 1, "minReplicas": 1, "maxReplicas": 1}
    assert spec == {**job, "workerGroupSpecs": [{**of_job, **nodes}]}
    command = command_line(shlex.split(document["spec"]["entrypoint"]))
    recipe = DEPLOYMENTS["rayjob.yaml"].recipe
    assert command["stages"] == npus(workers["rayStartParams"])
    assert (str(command["directory"]), str(command["model"]), command["address"]) == (
        recipe.output,
        recipe.model,
        "auto",
    )
    mounts = DEPLOYMENTS["rayjob.yaml"].mounts
    assert all(any(Path(path).is_relative_to(m) for m in mount) for path in command["data"] for mount in mounts)
    # A pattern would be expanded by the shells between manifest and job.
    assert not re.search(r"[*?$'\"]", document["spec"]["entrypoint"])
    (documented,) = (c for c in commands_of((ROOT / "deploy/README.md").read_text()) if "directory" in c)
    assert documented == command


@pytest.mark.parametrize("name", ["rayjob.yaml", "evaluate.yaml"])
def test_a_failed_job_does_not_build_its_cluster_again(name: str) -> None:
    """A mistake in the recipe fails as surely on a second cluster of 16 cards."""
    assert yaml.safe_load((ROOT / "deploy" / name).read_text())["spec"]["backoffLimit"] == 0


def test_shells_of_the_image_know_cann_whatever_starts_them(tmp_path: Path) -> None:
    """`bash -c`, as KubeRay starts Ray, a login shell's profile, and no shell twice over."""
    dockerfile = (ROOT / "deploy/Dockerfile").read_text()
    (target,) = re.findall(r"^COPY deploy/ascend\.sh (/etc/profile\.d/\S+\.sh)$", dockerfile, flags=re.MULTILINE)
    assert f"ENV BASH_ENV={target}\n" in dockerfile
    script = str(ROOT / "deploy/ascend.sh")
    cann = tmp_path / "set_env.sh"
    cann.write_text("export LD_LIBRARY_PATH=/cann/lib64:${LD_LIBRARY_PATH:-}\nbash -c true\n")
    path = {"PATH": "/usr/bin:/bin", "CANN_SET_ENV": str(cann)}

    def shown(*command: str, **environment: str) -> str:
        return subprocess.check_output(command, env={**path, **environment}, text=True, timeout=60).strip()

    assert shown("bash", "-c", 'echo "$LD_LIBRARY_PATH"', BASH_ENV=script) == "/cann/lib64:"
    assert shown("bash", "-c", "bash -c 'echo \"$LD_LIBRARY_PATH\"'; true", BASH_ENV=script) == "/cann/lib64:"
    assert shown("sh", "-c", f'. {script}; echo "$LD_LIBRARY_PATH"') == "/cann/lib64:"
    missing = {**path, "BASH_ENV": script, "CANN_SET_ENV": str(tmp_path / "none.sh")}
    twice = ("bash", "-c", "bash -c 'echo on'; true")
    found = subprocess.run(twice, env=missing, text=True, timeout=60, capture_output=True, check=True)
    assert found.stdout.strip() == "on"
    if not Path("/usr/local/Ascend").exists():
        (told,) = found.stderr.splitlines()  # once for a tree of processes
        assert f"at {tmp_path / 'none.sh'}, in /usr/local/Ascend: set CANN_SET_ENV" in told


@pytest.mark.parametrize("name", ["rayjob.yaml", "raycluster.yaml", "evaluate.yaml"])
def test_the_head_sees_no_card(name: str) -> None:
    """The Ascend runtime gives a pod that asks for no card all of them, unless it is told."""
    pods = [
        pod
        for document in yaml.safe_load_all((ROOT / "deploy" / name).read_text())
        for pod in re.findall(r"'name': 'ray-head'.*?'volumeMounts'", str(document))
    ]
    assert pods
    assert all("{'name': 'ASCEND_VISIBLE_DEVICES', 'value': 'void'}" in pod for pod in pods)


def test_the_image_is_built_from_what_it_needs() -> None:
    """What the Dockerfile copies is not left out of what is sent, and the history is."""
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    copied = re.findall(r"^COPY (.+) \S+$", (ROOT / "deploy/Dockerfile").read_text(), flags=re.MULTILINE)
    assert not {path.split("/")[0] for paths in copied for path in paths.split()} & set(ignored)
    assert {".git", "tests", "runs"} <= set(ignored)


@pytest.mark.parametrize(
    "script", ["jobs/quickstart.sh", "jobs/environment.sh", "deploy/ascend.sh", "tests/run.sh", ".ci/run"]
)
def test_shell_scripts_parse(script: str) -> None:
    """Bash finds no syntax error in a script that is shipped."""
    done = subprocess.run(["bash", "-n", str(ROOT / script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
