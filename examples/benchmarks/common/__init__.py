"""What the benchmarks share: the machine, whole processes measured, the least that any program must do, random inputs."""
