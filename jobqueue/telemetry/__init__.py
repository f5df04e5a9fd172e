"""What a process says about itself: logs, and messages to systemd."""
