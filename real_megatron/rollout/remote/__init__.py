"""What every engine behind HTTP needs: processes, replicas, routing, retries."""
