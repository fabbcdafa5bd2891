"""Holds deploy/kubernetes against the published schemas, and every kustomization against what it names."""

import json
import os
import pathlib
import subprocess
import sys

import kubernetes_validate
import yaml

root, version = pathlib.Path(sys.argv[1]), sys.argv[2]
wrong = []
checked = 0
of_keda = []


def documents(path):
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def objects(kustomization):
    """Everything that a kustomization brings, with what its resources bring."""
    found = []
    for name in yaml.safe_load(kustomization.read_text()).get("resources", []):
        path = kustomization.parent / name
        if path.is_dir():
            found += objects(path / "kustomization.yaml")
        elif path.is_file():
            found += documents(path)
        else:
            wrong.append(f"{kustomization}: there is no {name}")
    return found


def resolves(thing, pointer):
    for part in pointer.strip("/").split("/"):
        try:
            thing = thing[int(part)] if isinstance(thing, list) else thing[part]
        except (KeyError, IndexError, ValueError):
            return False
    return True


for path in sorted(root.rglob("*.yaml")):
    if path.name == "kustomization.yaml":
        kustomization = yaml.safe_load(path.read_text())
        brought = objects(path)
        for patch in kustomization.get("patches", []):
            target = patch["target"]
            matching = [o for o in brought if o["kind"] == target["kind"] and o["metadata"]["name"] == target["name"]]
            if len(matching) != 1:
                wrong.append(f"{path}: {len(matching)} objects are {target['kind']} {target['name']}")
                continue
            for step in yaml.safe_load(patch["patch"]):
                if step["op"] != "add" and not resolves(matching[0], step["path"]):
                    wrong.append(f"{path}: {target['kind']} {target['name']} has no {step['path']}")
        continue
    for document in documents(path):
        if document["apiVersion"] == "keda.sh/v1alpha1" and "KEDA_CHECK" in os.environ:
            of_keda.append({"path": str(path.relative_to(root)), "document": document})
            continue
        if not document["apiVersion"].startswith(("v1", "apps/", "batch/", "policy/", "networking.k8s.io/")):
            print(f"{path.relative_to(root)}: no schema at hand for {document['kind']} of {document['apiVersion']}")
            continue
        checked += 1
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            wrong.append(f"{path.relative_to(root)}: {'.'.join(map(str, error.path))}: {error.message}")

if of_keda:
    checked += len(of_keda)
    said = subprocess.run(
        ["node", os.environ["KEDA_CHECK"]], input=json.dumps(of_keda), text=True, stdout=subprocess.PIPE, check=True
    ).stdout
    wrong += said.splitlines()

for sentence in wrong:
    print(sentence)
if not checked:
    sys.exit("nothing was checked")
print(f"kubernetes: {checked} objects are as Kubernetes {version} wants them" if not wrong else "kubernetes: see above")
sys.exit(bool(wrong))
