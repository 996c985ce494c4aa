"""What people see: metrics, the dashboard, Grafana."""
