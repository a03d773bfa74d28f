"""The same core on Kafka: topics in, `sessions` and `histories` out, nothing lost when anything dies."""
