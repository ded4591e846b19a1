package config

// PoolConnections is how many connections the pool of a processor opens to one database at most: one for each writer, and some for reading,
// settling, and what goes on beside.
func (c *Config) PoolConnections() int { return c.Batch.Writers + 4 }

// ApplicationName is how the connections of a processor are called in pg_stat_activity, unless their connection string says otherwise.
func ApplicationName(processor string) string { return "millrace/" + processor }
