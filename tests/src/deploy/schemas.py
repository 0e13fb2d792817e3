# Checks Kubernetes objects, which come as YAML on the standard input, by the schemas of the versions named as arguments, unknown fields
# refused; those of the Prometheus operator by models made of its own definitions. Prints a line for each mistake.
import sys

import kubernetes_validate
import yaml
from cloudcoil.models.prometheus_operator import v1 as operator
from pydantic import ValidationError


def unknown(given, known, path):
    """Fields that were given and that the model did not take over."""
    if isinstance(given, dict) and isinstance(known, dict):
        for key, value in given.items():
            if key in known:
                yield from unknown(value, known[key], f"{path}.{key}")
            else:
                yield f"{path}.{key}: unknown field"
    elif isinstance(given, list) and isinstance(known, list):
        for index, (value, taken) in enumerate(zip(given, known)):
            yield from unknown(value, taken, f"{path}[{index}]")


def mistakes(item, version):
    kind = item["kind"]
    if item["apiVersion"] == "monitoring.coreos.com/v1":
        try:
            model = getattr(operator, kind).model_validate(item)
        except ValidationError as error:
            for detail in error.errors():
                yield f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}"
            return
        yield from unknown(item, model.model_dump(mode="json", by_alias=True, exclude_unset=True), "")
        return
    try:
        kubernetes_validate.validate(item, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{'.'.join(map(str, error.path))}: {error.message}"


checked = 0
for item in filter(None, yaml.safe_load_all(sys.stdin)):
    for version in sys.argv[1:]:
        checked += 1
        for mistake in mistakes(item, version):
            print(f"{version} {item['kind']}/{item['metadata']['name']}: {mistake}")
print(f"checked {checked}", file=sys.stderr)
