package pipeline

import (
	"testing"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

func TestCompareAge(t *testing.T) {
	null := Value{}
	for name, tc := range map[string]struct {
		t           config.ColumnType
		older, same Value
		newer       Value
	}{
		"integers":         {config.TypeBigint, intValue(-5), intValue(-5), intValue(3)},
		"doubles below 0":  {config.TypeDouble, doubleValue(-2.5), doubleValue(-2.5), doubleValue(-1)},
		"reals":            {config.TypeReal, realValue(-1), realValue(-1), realValue(0.5)},
		"numerics":         {config.TypeNumeric, textValue("9.50"), textValue("9.5"), textValue("10")},
		"large numerics":   {config.TypeNumeric, textValue("12345678901234567890.1234567890123456789"), textValue("12345678901234567890.12345678901234567890"), textValue("12345678901234567890.1234567890123456790")},
		"with an exponent": {config.TypeNumeric, textValue("-1e3"), textValue("-1000"), textValue("1e-3")},
		"texts, by bytes":  {config.TypeText, textValue("B"), textValue("B"), textValue("a")},
		"a missing value":  {config.TypeBigint, null, null, intValue(-1)},
	} {
		t.Run(name, func(t *testing.T) {
			if compareAge(tc.t, tc.older, tc.newer) >= 0 || compareAge(tc.t, tc.newer, tc.older) <= 0 || compareAge(tc.t, tc.older, tc.same) != 0 {
				t.Errorf("%d %d %d", compareAge(tc.t, tc.older, tc.newer), compareAge(tc.t, tc.newer, tc.older), compareAge(tc.t, tc.older, tc.same))
			}
		})
	}
}
