package database

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// Connections are those of a server that bear on one role in one database.
type Connections struct {
	// Max is what is allowed; -1: there is no such limit. What is kept for superusers and reserved roles is not counted.
	Max Counts
	// Used is what is there.
	Used Counts
	// By is Used by application name.
	By map[string]Counts
}

// Counts are numbers of connections: to the whole server, to the database, and of the role in all databases.
type Counts struct{ Server, Database, Role int64 }

// Server is the address of the server.
func (d *Database) Server() string { return d.host }

// Connections reads how many connections the server takes from a role, and how many there are.
func (d *Database) Connections(ctx context.Context, role string) (Connections, error) {
	c := Connections{By: map[string]Counts{}}
	err := d.Do(ctx, func(ctx context.Context, db pgstream.DB) error {
		err := db.QueryRow(ctx, `
			select current_setting('max_connections')::bigint - current_setting('superuser_reserved_connections')::bigint
				- coalesce(nullif(current_setting('reserved_connections', true), ''), '0')::bigint,
				(select datconnlimit from pg_database where datname = current_database()),
				coalesce((select rolconnlimit from pg_roles where rolname = $1), -1)`, role).
			Scan(&c.Max.Server, &c.Max.Database, &c.Max.Role)
		if err != nil {
			return err
		}
		// Of sessions of others, a role without privileges does not see what kind they are.
		rows, err := db.Query(ctx, `
			select coalesce(application_name, ''), count(*), count(*) filter (where datname = current_database()), count(*) filter (where usename = $1)
			from pg_stat_activity
			where usename is not null and coalesce(backend_type, 'client backend') = 'client backend'
			group by 1`, role)
		if err != nil {
			return err
		}
		var application string
		var n Counts
		_, err = pgx.ForEachRow(rows, []any{&application, &n.Server, &n.Database, &n.Role}, func() error {
			c.By[application] = n
			c.Used.Server, c.Used.Database, c.Used.Role = c.Used.Server+n.Server, c.Used.Database+n.Database, c.Used.Role+n.Role
			return nil
		})
		return err
	})
	if err != nil {
		return Connections{}, fmt.Errorf("read the connections of %s: %w", d, err)
	}
	return c, nil
}
