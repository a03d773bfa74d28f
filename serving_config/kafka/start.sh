#!/bin/bash
# Starts one broker of docker-compose.yml: NODE, VOTERS, LISTENERS, ADVERTISED, REPLICATION, MIN_ISR, CLUSTER_ID, DATA.
# The image's own start script writes into its installation, which a read-only root file system refuses.
set -euo pipefail
settings="${SETTINGS:-/tmp/server.properties}"
cat "$(dirname "$0")/server.properties" - > "$settings" <<END
node.id=$NODE
controller.quorum.voters=$VOTERS
listeners=$LISTENERS
advertised.listeners=$ADVERTISED
log.dirs=$DATA
default.replication.factor=$REPLICATION
min.insync.replicas=$MIN_ISR
offsets.topic.replication.factor=$REPLICATION
transaction.state.log.replication.factor=$REPLICATION
transaction.state.log.min.isr=$MIN_ISR
share.coordinator.state.topic.replication.factor=$REPLICATION
share.coordinator.state.topic.min.isr=$MIN_ISR
END
"${KAFKA_HOME:-/opt/kafka}/bin/kafka-storage.sh" format --ignore-formatted --cluster-id "$CLUSTER_ID" --config "$settings"
exec "${KAFKA_HOME:-/opt/kafka}/bin/kafka-server-start.sh" "$settings"
