"""Run configurations: strict schemas, YAML files and ``a.b=c`` overrides."""
