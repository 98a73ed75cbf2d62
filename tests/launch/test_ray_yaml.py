"""launch/ray.yaml describes a cluster of the Ray that the extras install, all of whose nodes see one folder."""

import re

import yaml
from paths import ROOT


def test_the_cluster_runs_the_pinned_ray_on_one_image_and_one_disk():
    claim, cluster = yaml.safe_load_all((ROOT / "launch/ray.yaml").read_text())
    spec = cluster["spec"]
    pinned = set(re.findall(r'"ray(?:\[default\])?==([\d.]+)"', (ROOT / "pyproject.toml").read_text()))
    assert pinned == {spec["rayVersion"]}
    pods = [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
    for pod in pods:
        assert [volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"]] == [
            claim["metadata"]["name"]
        ]
        assert [container["image"] for container in pod["containers"]] == ["IMAGE"]
        assert pod["containers"][0]["volumeMounts"] == [{"name": "data", "mountPath": "/data"}]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"] and spec["authOptions"]["mode"] == "token"
