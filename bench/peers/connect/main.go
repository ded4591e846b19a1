// Command connect is Redpanda Connect with the components that the benchmark's pipeline needs, and no others.
package main

import (
	"context"

	_ "github.com/lib/pq"
	"github.com/redpanda-data/benthos/v4/public/service"
	_ "github.com/redpanda-data/connect/v4/public/components/redis"
	_ "github.com/redpanda-data/connect/v4/public/components/sql/base"

	_ "github.com/redpanda-data/benthos/v4/public/components/pure"
)

func main() { service.RunCLI(context.Background()) }
