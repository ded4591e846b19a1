package gitops

import (
	"regexp"
	"testing"

	"github.com/argoproj/argo-cd/v3/util/rbac"
	"k8s.io/client-go/kubernetes/fake"
)

// TestTheRoleOfTheDocumentationMayRunActions gives the policy that docs/gitops.md shows to Argo CD's enforcer.
func TestTheRoleOfTheDocumentationMayRunActions(t *testing.T) {
	t.Parallel()
	policy := regexp.MustCompile("`(p, role:oncall, [^`]*)`").FindStringSubmatch(text(t, "../../docs/gitops.md"))
	if policy == nil {
		t.Fatal("docs/gitops.md shows no policy of role:oncall")
	}
	enforcer := rbac.NewEnforcer(fake.NewClientset(), "argocd", "argocd-rbac-cm", nil)
	if err := enforcer.SetUserPolicy(policy[1]); err != nil {
		t.Fatal(err)
	}
	for _, kind := range kinds {
		if !enforcer.Enforce("role:oncall", "applications", "action/"+group+"/"+kind+"/suspend", "default/orders") {
			t.Errorf("the role may not suspend a %s", kind)
		}
	}
	if enforcer.Enforce("role:oncall", "applications", "action/apps/Deployment/restart", "default/orders") {
		t.Error("the role may restart Deployments")
	}
}
