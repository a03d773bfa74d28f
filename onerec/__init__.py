"""What every part shares: command line, configuration, errors, freshness."""
