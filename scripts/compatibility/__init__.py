"""What must hold elsewhere than on the machine of a developer: other servers, a pooler, upgrades, systemd, another user."""
